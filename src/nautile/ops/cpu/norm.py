"""RMSNorm that keeps x and one reciprocal root per row for its backward; without one, in C++."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.core import jit
from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.cpu.support import needs_gradient
from nautile.ops.precision import accumulate_dtype, compute_dtype, no_autocast

__all__ = ["rms_norm", "why_not"]

_NATIVE = Path(__file__).parent / "native"
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `nautile.ops.rms_norm`."""
    dtype = compute_dtype(x)
    if x.dtype == dtype and weight.is_cpu and _function(x.dtype, weight.dtype) and not needs_gradient(x, weight):
        return _native_rms_norm(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps, dtype)


def _native_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One read of x from memory; torch's operators make three passes over copies in float32."""
    x_MD, y = x.reshape(-1, x.shape[-1]), x.new_empty(x.shape)
    x_MD, weight = x_MD if x_MD.stride(1) == 1 else x_MD.contiguous(), weight.contiguous()
    if y.numel():
        run = _function(x.dtype, weight.dtype)
        sizes = (x_MD.shape[0], x_MD.shape[1], torch.get_num_threads())
        run(x_MD.data_ptr(), x_MD.stride(0), weight.data_ptr(), eps, y.data_ptr(), *sizes)
    return y


@cache
def _function(x: torch.dtype, weight: torch.dtype) -> Any:
    """The native function for these dtypes; None if there is none, or no compiler."""
    if x not in _NAMES or weight not in _NAMES or (x, weight) == (torch.float32, torch.bfloat16) or jit.why_no_cxx():
        return None
    library = jit.load_cxx(_NATIVE / "norm.cpp", _NATIVE / "lanes.h")
    return declared(library, f"rms_norm_{_NAMES[x]}_{_NAMES[weight]}")


def declared(library: ctypes.CDLL, name: str) -> Any:
    """A function of which ctypes knows the types of arguments."""
    function, p, n = library[name], ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [p, n, p, ctypes.c_float, p, n, n, ctypes.c_int]
    function.restype = None
    return function


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = accumulate_dtype(x)
        # vector_norm reads x once and writes one number per row; square().mean() would write a second x.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        rstd = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x.to(wide) * rstd).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """With n = x·r and p = dy⊙n: dw = Σ p, dx = r (dy⊙w − n · (p·w)/D)."""
        x, weight, rstd = ctx.saved_tensors
        D = x.shape[-1]
        # Casts are written out: arithmetic on two dtypes makes a hidden wide copy of the narrow one for each operator.
        w = weight.to(rstd.dtype)
        grad = grad_y.reshape(-1, D).to(rstd.dtype, copy=True)
        normal = x.reshape(-1, D).to(rstd.dtype) * rstd.view(-1, 1)
        product = grad * normal
        with no_autocast(x):
            along = torch.mv(product, w).unsqueeze(1)
        grad_x = grad.mul_(w).addcmul_(normal, along, value=-1.0 / D).mul_(rstd.view(-1, 1))
        return grad_x.view(x.shape).to(x.dtype), product.sum(0).to(weight.dtype), None, None
