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


def pack_ue8m0(scale: Tensor) -> Tensor:
    """int32 [..., ⌈J / 4⌉] of powers of two [..., J]: their exponents, the first in the lowest byte, 0 past the end."""
    words = -(-scale.shape[-1] // 4)
    exponent = scale.new_zeros((*scale.shape[:-1], 4 * words), dtype=torch.uint8)
    exponent[..., : scale.shape[-1]] = scale.view(torch.int32) >> 23
    return exponent.view(torch.int32) if exponent.numel() else exponent[..., :words].to(torch.int32)


def unpack_ue8m0(packed: Tensor) -> Tensor:
    """float32 [..., 4 J] of int32 [..., J]; what was past the end is 0."""
    return (packed.contiguous().view(torch.uint8).to(torch.int32) << 23).view(torch.float32)


def mn_major_scales(scale_MJ: Tensor, packed: bool) -> Tensor:
    """See `nautile.ops.scale_packing.mn_major_scales`."""
    source = pack_ue8m0(scale_MJ) if packed else scale_MJ
    *lead, M, J = source.shape
    filled = source.new_zeros(*lead, J, -(-M // 4) * 4)
    filled[..., :M] = source.mT
    return filled[..., :M].mT
