"""Specification of `nautile.ops.packed_experts`."""

import torch
from torch import Tensor

from nautile.ops.packed_weight import PackedWeight
from nautile.ops.precision import accumulate_dtype, compute_dtype, no_autocast
from nautile.ops.reference.experts import grouped_swiglu


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def packed_experts(
    x_TD: Tensor, gate_up: PackedWeight, down: PackedWeight, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """All weights unpacked, and the mixture in float32 or better."""
    dtype, wide = compute_dtype(x_TD), accumulate_dtype(x_TD)
    with no_autocast(x_TD):
        x = x_TD.to(dtype).to(wide)
        return grouped_swiglu(x, gate_up.unpack(wide), down.unpack(wide), experts_TK, weights_TK).to(dtype)
