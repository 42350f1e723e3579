"""Interleaved rotation as one complex product; its backward is the rotation by the opposite angle."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.precision import accumulate_dtype

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
    wide = accumulate_dtype(x_BSHR)
    turn = torch.complex(cos_BSP.to(wide), sin_BSP.to(wide))[:, :, None]
    # A fresh copy: its pairs are adjacent, which a complex view needs, and it may be turned in place.
    out = torch.empty(x_BSHR.shape, dtype=wide).copy_(x_BSHR)
    torch.view_as_complex(out.unflatten(-1, (-1, 2))).mul_(turn)
    return out.to(x_BSHR.dtype)
