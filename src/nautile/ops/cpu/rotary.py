"""Rotations as few passes over memory; their backward is the rotation by the opposite angle."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.precision import accumulate_dtype

__all__ = ["rotate_half_split", "rotate_interleaved", "why_not"]

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotate_interleaved(x_BSHR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor) -> Tensor:
    """See `nautile.ops.rotate_interleaved`."""
    return _Rotate.apply(x_BSHR, cos_BSP, sin_BSP, _turn_interleaved)


def rotate_half_split(x_BSHR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor) -> Tensor:
    """See `nautile.ops.rotate_half_split`."""
    return _Rotate.apply(x_BSHR, cos_BSP, sin_BSP, _turn_half_split)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.turn = turn
        return turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.turn(grad, cos, -sin), None, None, None


def _turn_interleaved(x_BSHR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor) -> Tensor:
    """One complex product."""
    wide = accumulate_dtype(x_BSHR)
    turn = torch.complex(cos_BSP.to(wide), sin_BSP.to(wide))[:, :, None]
    # A fresh copy: its pairs are adjacent, which a complex view needs, and it may be turned in place.
    out = torch.empty(x_BSHR.shape, dtype=wide).copy_(x_BSHR)
    torch.view_as_complex(out.unflatten(-1, (-1, 2))).mul_(turn)
    return out.to(x_BSHR.dtype)


def _turn_half_split(x_BSHR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor) -> Tensor:
    """Two products and two fused multiply-adds, each over half of the head."""
    wide = accumulate_dtype(x_BSHR)
    x = x_BSHR.to(wide)
    cos, sin = cos_BSP[:, :, None].to(wide), sin_BSP[:, :, None].to(wide)
    out = torch.empty(x.shape, dtype=wide)
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.to(x_BSHR.dtype)
