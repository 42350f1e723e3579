"""Powers of two as scales: rounded up to, and in the bytes of UE8M0, the exponent of a float32 without sign."""

import torch
from torch import Tensor


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def ceil_to_ue8m0(x: Tensor) -> Tensor:
    """float32: the smallest power of two ≥ |x|, from 2^−126 to 2^127. Not a cast to ``float8_e8m0fnu``, which rounds
    to the nearest: 1.4 to 1, and then 448 · 1.4 would not fit.
    """
    bits = x.float().view(torch.int32)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0)
    return (exponent.clamp(1, 254) << 23).view(torch.float32)
