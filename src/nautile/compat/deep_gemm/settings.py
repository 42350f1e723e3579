"""What DeepGEMM's callers set for the process: kept and given back; our kernels choose for themselves.

The one that changes results is the alignment of groups, which says how their rows lie in memory.
"""

from dataclasses import dataclass

from nautile.compat.deep_gemm.errors import need
from nautile.compat.device import multiprocessors
from nautile.ops.group_layout import ALIGNMENT


@dataclass
class _Settings:
    num_sms: int | None = None
    tc_util: int = 100
    pdl: bool = False
    ignore_compile_dims: bool = False
    block_size_multiple_of: tuple[int, int] = (1, 1)
    alignment: int = ALIGNMENT


_settings = _Settings()


def set_num_sms(num_sms: int) -> None:
    """How many multiprocessors kernels may use; schedules are made for so many."""
    need(
        0 <= num_sms <= multiprocessors(), "set_num_sms", f"num_sms must lie in [0, {multiprocessors()}], got {num_sms}"
    )
    _settings.num_sms = num_sms


def get_num_sms() -> int:
    """What was set, or the device's number; 132, an H100's, without one."""
    return _settings.num_sms or multiprocessors()


def set_tc_util(tc_util: int) -> None:
    """Approximate use of the tensor cores in percent."""
    need(0 <= tc_util <= 100, "set_tc_util", f"tc_util is a percentage, got {tc_util}")
    _settings.tc_util = tc_util


def get_tc_util() -> int:
    """What was set; 100 at first."""
    return _settings.tc_util


def set_pdl(enable_pdl: bool) -> None:
    """Whether kernels may begin before the one before them has ended."""
    _settings.pdl = enable_pdl


def get_pdl() -> bool:
    """What was set; False at first."""
    return _settings.pdl


def set_ignore_compile_dims(new_value: bool) -> None:
    """Whether `compiled_dims` are left to run time. Ours always are: no result depends on it."""
    _settings.ignore_compile_dims = new_value


def set_block_size_multiple_of(new_value: int | tuple[int, int]) -> None:
    """What tile sizes must be multiples of. Ours are powers of two of at least 16: no result depends on it."""
    _settings.block_size_multiple_of = (new_value, new_value) if isinstance(new_value, int) else new_value


def set_mk_alignment_for_contiguous_layout(new_value: int) -> None:
    """Rows that every group of a contiguous layout begins at a multiple of."""
    need(
        new_value > 0 and new_value % 16 == 0,
        "set_mk_alignment_for_contiguous_layout",
        f"the alignment must be a positive multiple of 16, got {new_value}",
    )
    _settings.alignment = new_value


def get_mk_alignment_for_contiguous_layout() -> int:
    """What was set; 128 at first."""
    return _settings.alignment


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None) -> int:
    """The best alignment for groups of about so many rows: on SM90 always 128."""
    return ALIGNMENT
