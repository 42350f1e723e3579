"""Specification of `nautile.ops.packed_linear`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile.ops.packed_weight import PackedWeight
from nautile.ops.precision import accumulate_dtype, compute_dtype, no_autocast


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def packed_linear(x: Tensor, weight: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """The weight unpacked, and one product in float32 or better."""
    dtype, wide = compute_dtype(x), accumulate_dtype(x)
    with no_autocast(x):
        bias = None if bias_O is None else bias_O.to(wide)
        return F.linear(x.to(dtype).to(wide), weight.unpack(wide), bias).to(dtype)
