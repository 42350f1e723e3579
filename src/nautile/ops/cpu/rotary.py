"""Interleaved rotation; its backward is the rotation by the opposite angle."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.support import floats_on_cpu as why_not

__all__ = ["rotate_interleaved", "why_not"]


def rotate_interleaved(x_BSHR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor) -> Tensor:
    """See `nautile.ops.rotate_interleaved`."""
    return _Rotate.apply(x_BSHR, cos_BSP, sin_BSP)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x_BSHR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor) -> Tensor:
    cos, sin = cos_BSP[:, :, None], sin_BSP[:, :, None]
    even, odd = x_BSHR[..., 0::2], x_BSHR[..., 1::2]
    out = torch.empty_like(x_BSHR, memory_format=torch.contiguous_format)
    out[..., 0::2] = (even * cos).sub_(odd * sin)
    out[..., 1::2] = (even * sin).add_(odd * cos)
    return out
