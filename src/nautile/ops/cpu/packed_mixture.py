"""The mixture with packed weights in C++: `native/packed_experts.cpp`."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nautile.core import jit
from nautile.ops.cpu.packed import why_not
from nautile.ops.cpu.support import needs_gradient
from nautile.ops.packed_weight import BITS, PackedWeight
from nautile.ops.precision import compute_dtype
from nautile.ops.reference import packed_mixture as reference

__all__ = ["packed_experts", "why_not"]

FLAGS: tuple[str, ...] = ()
"""Further compiler flags: tests take instructions away with them."""

_FOLDER = Path(__file__).parent / "native"


class Stack(ctypes.Structure):
    """The struct of the same name in `native/packed_experts.cpp`."""

    _fields_ = (
        ("bits", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("group", "outputs", "inputs")),
    )

    @classmethod
    def of(cls, weight: PackedWeight) -> "Stack":
        scales = None if weight.scale is None else weight.scale.data_ptr()
        sizes = (weight.group, weight.outputs, weight.inputs)
        return cls(BITS[weight.kind], weight.data.data_ptr(), scales, *sizes)


class Problem(ctypes.Structure):
    """The struct of the same name in `native/packed_experts.cpp`."""

    _fields_ = (
        ("gate_up", Stack),
        ("down", Stack),
        ("x", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("experts", "weights", "out")),
        *((name, ctypes.c_int64) for name in ("T", "K", "threads")),
    )


def packed_experts(
    x_TD: Tensor, gate_up: PackedWeight, down: PackedWeight, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """See `nautile.ops.packed_experts`."""
    if needs_gradient(x_TD, weights_TK):
        return reference.packed_experts(x_TD, gate_up, down, experts_TK, weights_TK)
    x = x_TD.to(compute_dtype(x_TD))
    x = x if x.stride(-1) == 1 else x.contiguous()
    out_TD = x.new_empty(x.shape)
    if not experts_TK.numel() or not gate_up.outputs:
        return out_TD.zero_()
    experts, weights = experts_TK.contiguous(), weights_TK.float().contiguous()
    problem = Problem(
        *(Stack.of(gate_up), Stack.of(down), x.data_ptr(), x.stride(0)),
        *(experts.data_ptr(), weights.data_ptr(), out_TD.data_ptr()),
        *(*experts.shape, torch.get_num_threads()),
    )
    _library(FLAGS).packed_experts(ctypes.byref(problem), ctypes.c_int64(x.dtype == torch.bfloat16))
    return out_TD


@cache
def _library(flags: tuple[str, ...]) -> ctypes.CDLL:
    return jit.load_cxx(_FOLDER / "packed_experts.cpp", _FOLDER / "panels.h", _FOLDER / "lanes.h", flags=flags)
