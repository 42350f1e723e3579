"""Products with packed weights in C++: `native/packed.cpp`."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nautile.core import jit
from nautile.ops.cpu.support import needs_gradient
from nautile.ops.packed_weight import BITS, PackedWeight
from nautile.ops.precision import compute_dtype
from nautile.ops.reference import packed as reference

__all__ = ["packed_linear", "why_not"]

_NATIVE = Path(__file__).parent / "native"


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Native code takes float32 and bfloat16 on the CPU, where a compiler is."""
    if device.type != "cpu":
        return f"tensors are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype} is not one of float32, bfloat16"
    return jit.why_no_cxx()


def packed_linear(x: Tensor, weight: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """See `nautile.ops.packed_linear`."""
    if needs_gradient(x) or (bias_O is not None and needs_gradient(bias_O)):
        return reference.packed_linear(x, weight, bias_O)
    x_MD = x.to(compute_dtype(x)).reshape(-1, weight.inputs)
    if x_MD.stride(-1) != 1:
        x_MD = x_MD.contiguous()
    y = x_MD.new_empty(*x.shape[:-1], weight.outputs)
    if not y.numel():
        return y
    bias = None if bias_O is None else bias_O.float().contiguous()
    function = _library().packed_linear_bf16 if x_MD.dtype == torch.bfloat16 else _library().packed_linear_f32
    function(
        BITS[weight.kind],
        weight.data.data_ptr(),
        None if weight.scale is None else weight.scale.data_ptr(),
        weight.group,
        x_MD.data_ptr(),
        x_MD.stride(0),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x_MD.shape[0],
        weight.outputs,
        weight.inputs,
        torch.get_num_threads(),
    )
    return y


@cache
def _library() -> ctypes.CDLL:
    return declared(jit.load_cxx(_NATIVE / "packed.cpp", _NATIVE / "panels.h", _NATIVE / "lanes.h"))


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Of which ctypes knows the types of arguments."""
    p, n = ctypes.c_void_p, ctypes.c_int64
    for function in (library.packed_linear_bf16, library.packed_linear_f32):
        function.argtypes = [ctypes.c_int, p, p, n, p, n, p, p, n, n, n, ctypes.c_int]
        function.restype = None
    return library
