"""Projections: oneDNN's kernels where no backward follows, torch's where one does, and for a few rows of bfloat16, as
in decoding, our own: the time is that of reading the weights, and oneDNN reads them at half the speed of the memory.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile.core import jit
from nautile.ops.cpu import onednn
from nautile.ops.cpu.activation import swiglu
from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.cpu.support import needs_gradient

__all__ = ["gated_linear", "linear", "why_not"]

FEW = 48
"""Rows up to which native code is faster than oneDNN in bfloat16, and its buffers are made for."""
_NATIVE = Path(__file__).parent / "native"


def linear(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """See `nautile.ops.linear`."""
    few = _few(x, weight_OD) and (bias_O is None or (bias_O.is_cpu and bias_O.dtype == x.dtype))
    if few and (bias_O is None or not needs_gradient(bias_O)):
        return _native_linear(x, weight_OD, bias_O)
    # In other dtypes than float32, torch's own choice is oneDNN already.
    if x.dtype == torch.float32 and _fast(x, weight_OD) and (bias_O is None or not needs_gradient(bias_O)):
        return onednn.product(x, weight_OD, bias_O)
    return F.linear(x, weight_OD, bias_O)


def gated_linear(x: Tensor, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """See `nautile.ops.gated_linear`."""
    if _few(x, gate_FD, up_FD):
        return _native_gated_linear(x, gate_FD, up_FD)
    if _fast(x, gate_FD, up_FD):
        return onednn.gated_product(x, gate_FD, up_FD)
    return swiglu(F.linear(x, gate_FD), F.linear(x, up_FD))


def _fast(x: Tensor, *weights: Tensor) -> bool:
    return not torch.is_autocast_enabled("cpu") and onednn.suits(x, *weights) and not needs_gradient(x, *weights)


def _few(x: Tensor, *weights: Tensor) -> bool:
    """Whether native code may take these, and is faster."""
    return (
        x.dtype == torch.bfloat16
        and 0 < x.numel() <= FEW * x.shape[-1]
        and all(w.is_cpu and w.dtype == torch.bfloat16 and w.stride(1) == 1 and w.shape[0] > 0 for w in weights)
        and not needs_gradient(x, *weights)
        and jit.why_no_cxx() is None
    )


def _native_linear(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    x_MD, y = _rows(x), x.new_empty(*x.shape[:-1], weight_OD.shape[0])
    bias = None if bias_O is None else bias_O.float().contiguous()
    _library().linear_bf16(
        *_place(x_MD), *_place(weight_OD), None if bias is None else bias.data_ptr(), *_sizes(x_MD, y)
    )
    return y


def _native_gated_linear(x: Tensor, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    x_MD, y = _rows(x), x.new_empty(*x.shape[:-1], gate_FD.shape[0])
    _library().gated_linear_bf16(*_place(x_MD), *_place(gate_FD), *_place(up_FD), *_sizes(x_MD, y))
    return y


def _rows(x: Tensor) -> Tensor:
    """[M, D] whose rows have no gaps inside."""
    x_MD = x.reshape(-1, x.shape[-1])
    return x_MD if x_MD.stride(1) == 1 else x_MD.contiguous()


def _place(matrix: Tensor) -> tuple[int, int]:
    """Address, and numbers from row to row."""
    return matrix.data_ptr(), matrix.stride(0)


def _sizes(x_MD: Tensor, y: Tensor) -> tuple[int, int, int, int, int]:
    """Address of the result, rows, outputs, inputs, threads."""
    return y.data_ptr(), x_MD.shape[0], y.shape[-1], x_MD.shape[1], torch.get_num_threads()


@cache
def _library() -> ctypes.CDLL:
    headers = (_NATIVE / "rows.h", _NATIVE / "panels.h", _NATIVE / "lanes.h")
    return declared(jit.load_cxx(_NATIVE / "projection.cpp", *headers))


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Of which ctypes knows the types of arguments."""
    p, n = ctypes.c_void_p, ctypes.c_int64
    matrix, sizes = [p, n], [p, n, n, n, ctypes.c_int]
    library.linear_bf16.argtypes = [*matrix, *matrix, p, *sizes]
    library.gated_linear_bf16.argtypes = [*matrix, *matrix, *matrix, *sizes]
    library.linear_bf16.restype = library.gated_linear_bf16.restype = None
    return library
