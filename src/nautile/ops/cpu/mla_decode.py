"""Absorbed MLA decode in C++ (`native/mla.cpp`): every cached row is read once, as key and as value.

B sequences, S queries, H heads, C latent, R rope, N blocks of P rows, W entries of a sequence's block table.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nautile.core import jit

DTYPES = (torch.bfloat16, torch.float32)
MOST_QUERIES = 512
"""Query rows, S · H, up to which the sums of one sequence stay in a core's second-level cache."""
FLAGS: tuple[str, ...] = ()
"""Further compiler flags: tests take instructions away with them."""

_FOLDER = Path(__file__).parent / "native"


class Problem(ctypes.Structure):
    """The struct of the same name in `native/mla.cpp`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "q_rope", "c", "rope", "out", "lse", "table", "last")),
        *((name, ctypes.c_int64) for name in ("B", "S", "H", "C", "R")),
        *((name, ctypes.c_int64 * 3) for name in ("q_strides", "rope_strides")),
        *((name, ctypes.c_int64) for name in ("blocks", "page", "table_width", "c_block", "c_row", "r_block", "r_row")),
        ("scale", ctypes.c_double),
        ("threads", ctypes.c_int64),
    )


def takes(*tensors: Tensor) -> bool:
    """Whether queries and caches have one dtype that the native code multiplies, and rows without gaps."""
    if tensors[0].dtype not in DTYPES or jit.why_no_cxx() is not None:
        return False
    _, S, H, _ = tensors[0].shape
    same = all(x.is_cpu and x.dtype == tensors[0].dtype and (x.stride(-1) == 1 or x.shape[-1] <= 1) for x in tensors)
    return same and 0 < S * H <= MOST_QUERIES and tensors[0].numel() > 0


def decode(
    q_BSHC: Tensor,
    q_rope_BSHR: Tensor,
    c_NPC: Tensor,
    rope_NPR: Tensor,
    last_BS: Tensor,
    scale: float,
    table_BW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query to the rows up to `last`, which is -1 where it reads none and its output is zero.

    Args:
        q_BSHC: Absorbed queries that `takes` accepts, as all that follow.
        q_rope_BSHR: Their rotated part.
        c_NPC: Latents: block n of the cache; without a table, sequence n.
        rope_NPR: Rotated keys.
        last_BS: int64.
        scale: Factor on the scores.
        table_BW: int32: the blocks of each sequence.

    Returns:
        o_BSHC in the dtype of q, and in float32 lse_BHS, the natural logarithm of the sum of exp(score), +inf where
        there is no row.

    Raises:
        ValueError: A query reads past its sequence's rows, or the table names a block that is none.
    """
    B, S, H, C = q_BSHC.shape
    out, lse_BHS = q_BSHC.new_empty(q_BSHC.shape), q_BSHC.new_empty(B, H, S, dtype=torch.float32)
    last = last_BS.contiguous()
    table = None if table_BW is None else table_BW.to(torch.int32).contiguous()
    problem = Problem(
        q_BSHC.data_ptr(),
        q_rope_BSHR.data_ptr(),
        c_NPC.data_ptr(),
        rope_NPR.data_ptr(),
        out.data_ptr(),
        lse_BHS.data_ptr(),
        None if table is None else table.data_ptr(),
        last.data_ptr(),
        *(B, S, H, C, rope_NPR.shape[-1]),
        (ctypes.c_int64 * 3)(*q_BSHC.stride()[:3]),
        (ctypes.c_int64 * 3)(*q_rope_BSHR.stride()[:3]),
        *(c_NPC.shape[0], c_NPC.shape[1], 0 if table is None else table.shape[1]),
        *(*c_NPC.stride()[:2], *rope_NPR.stride()[:2]),
        scale,
        torch.get_num_threads(),
    )
    wrong = _library(FLAGS).mla_decode(ctypes.byref(problem), ctypes.c_int64(q_BSHC.dtype == torch.bfloat16))
    if wrong == 1:
        have = c_NPC.shape[1] * (1 if table is None else table.shape[1])
        raise ValueError(f"MLA decode: a query reads row {int(last.max())}, but a sequence has room for {have}")
    if wrong == 2:
        raise ValueError(f"MLA decode: the block table names a block outside [0, {c_NPC.shape[0]})")
    return out, lse_BHS


@cache
def _library(flags: tuple[str, ...]) -> ctypes.CDLL:
    library = jit.load_cxx(_FOLDER / "mla.cpp", _FOLDER / "mla_tiles.h", _FOLDER / "lanes.h", flags=flags)
    library.mla_decode.restype = ctypes.c_int64
    return library
