"""Specification of `nautile.ops.rotate_interleaved` and `nautile.ops.rotate_half_split`."""

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def rotate_interleaved(x_BSHR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor) -> Tensor:
    """Even and odd dimensions are the two coordinates of each pair."""
    wide = accumulate_dtype(x_BSHR)
    cos, sin = cos_BSP[:, :, None].to(wide), sin_BSP[:, :, None].to(wide)
    even, odd = x_BSHR[..., 0::2].to(wide), x_BSHR[..., 1::2].to(wide)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x_BSHR.dtype)


def rotate_half_split(x_BSHR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor) -> Tensor:
    """The first and the second half of a head are the two coordinates of each pair."""
    wide = accumulate_dtype(x_BSHR)
    cos, sin = cos_BSP[:, :, None].to(wide), sin_BSP[:, :, None].to(wide)
    first, second = x_BSHR.to(wide).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x_BSHR.dtype)
