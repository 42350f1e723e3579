"""The mixture of a few tokens in C++ (`native/experts.cpp`): only the weights of chosen experts are read, once.

T tokens, K choices of each, E experts, D model, F ffn.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nautile.core import jit

DTYPES = (torch.bfloat16, torch.float32)
MOST_PER_EXPERT = 4
"""Choices per chosen expert, on average, up to which reading the weights takes longer than multiplying."""
FLAGS: tuple[str, ...] = ()
"""Further compiler flags: tests take instructions away with them."""

_FOLDER = Path(__file__).parent / "native"


class Problem(ctypes.Structure):
    """The struct of the same name in `native/experts.cpp`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "gate_up", "down", "experts", "weights", "out")),
        *((name, ctypes.c_int64) for name in ("T", "K", "E", "D", "F", "x_row")),
        *((name, ctypes.c_int64) for name in ("up_expert", "up_row", "down_expert", "down_row", "threads")),
    )


def takes(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_TK: Tensor) -> bool:
    """Whether all have one dtype that the native code multiplies, rows have no gaps, and the tokens are few."""
    if x_TD.dtype not in DTYPES or jit.why_no_cxx() is not None or not experts_TK.numel():
        return False
    tensors = (x_TD, gate_up_E2FD, down_EDF)
    if not all(x.is_cpu and x.dtype == x_TD.dtype and (x.stride(-1) == 1 or x.shape[-1] <= 1) for x in tensors):
        return False
    choices = experts_TK.numel()
    return choices <= MOST_PER_EXPERT or choices <= MOST_PER_EXPERT * experts_TK.unique().numel()


def mixture(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """`nautile.ops.grouped_swiglu` for arguments that `takes` accepts."""
    (T, K), (E, D, F) = experts_TK.shape, down_EDF.shape
    out_TD = x_TD.new_empty(T, D)
    experts, weights = experts_TK.contiguous(), weights_TK.float().contiguous()
    problem = Problem(
        *(x.data_ptr() for x in (x_TD, gate_up_E2FD, down_EDF, experts, weights, out_TD)),
        *(T, K, E, D, F, x_TD.stride(0), *gate_up_E2FD.stride()[:2], *down_EDF.stride()[:2]),
        torch.get_num_threads(),
    )
    if _library(FLAGS).experts_decode(ctypes.byref(problem), ctypes.c_int64(x_TD.dtype == torch.bfloat16)):
        raise ValueError(f"grouped_swiglu: experts must lie in [0, {E})")
    return out_TD


@cache
def _library(flags: tuple[str, ...]) -> ctypes.CDLL:
    library = jit.load_cxx(_FOLDER / "experts.cpp", _FOLDER / "lanes.h", flags=flags)
    library.experts_decode.restype = ctypes.c_int64
    return library
