"""RMSNorm that keeps x and one reciprocal root per row for its backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.precision import accumulate_dtype, compute_dtype, no_autocast

__all__ = ["rms_norm", "why_not"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `nautile.ops.rms_norm`."""
    return _RmsNorm.apply(x, weight, eps, compute_dtype(x))


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
