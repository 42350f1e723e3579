"""RMSNorm that keeps x and one reciprocal root per row for its backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.precision import accumulate_dtype, compute_dtype

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
        return (x * rstd).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """With n = x·r: dw = Σ dy⊙n, dx = r (dy⊙w − n · mean(dy⊙w⊙n))."""
        x, weight, rstd = ctx.saved_tensors
        normal = x * rstd
        grad_normal = grad_y * weight
        D = x.shape[-1]
        # Row sums of products as tiny matrix products: no third full-size temporary.
        along = torch.linalg.vecdot(grad_normal, normal).unsqueeze(-1)
        grad_weight = (normal * grad_y).reshape(-1, D).sum(0).to(weight.dtype)
        grad_x = grad_normal.sub_(normal.mul_(along.div_(D))).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None, None
