"""Specification of `nautile.ops.rms_norm`."""

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype, compute_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula, in float32 or better."""
    wide = x.to(accumulate_dtype(x))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * weight.to(wide.dtype)).to(compute_dtype(x))
