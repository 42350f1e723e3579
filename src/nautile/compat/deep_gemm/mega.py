"""DeepGEMM's Mega MoE, dispatch, experts and combine in one kernel: it has no SM90 form, and these say so."""

from typing import Any, NoReturn

from nautile.compat.deep_gemm.errors import sm100_only


def get_symm_buffer_for_mega_moe(*args: Any, **kwargs: Any) -> NoReturn:
    """Only on SM100.

    Raises:
        NotOnHopperError: Always.
    """
    sm100_only("get_symm_buffer_for_mega_moe", "Mega MoE")


def transform_weights_for_mega_moe(*args: Any, **kwargs: Any) -> NoReturn:
    """Only on SM100.

    Raises:
        NotOnHopperError: Always.
    """
    sm100_only("transform_weights_for_mega_moe", "Mega MoE")


def fp8_fp4_mega_moe(*args: Any, **kwargs: Any) -> NoReturn:
    """Only on SM100.

    Raises:
        NotOnHopperError: Always.
    """
    sm100_only("fp8_fp4_mega_moe", "Mega MoE")


def bf16_mega_moe(*args: Any, **kwargs: Any) -> NoReturn:
    """Only on SM100.

    Raises:
        NotOnHopperError: Always.
    """
    sm100_only("bf16_mega_moe", "Mega MoE")
