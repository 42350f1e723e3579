"""Specification of 12-bit numbers, in integer arithmetic."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile.ops.reference.quantization import SMALLEST_AMAX
from nautile.ops.reference.scale_packing import ceil_to_ue8m0

LARGEST = 65024.0
PLACES = (0, 12, 24, 36, 48, 60, 72, 84)
"""First bit of each of eight numbers, counted from the highest of 96."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def quantize_e5m6(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(data, scale); see `nautile.ops.quantize_e5m6`."""
    C = x.shape[-1]
    blocks = F.pad(x.float(), (0, -C % block)).unflatten(-1, (-(-C // block), block))
    scale = ceil_to_ue8m0(blocks.abs().amax(-1).clamp(min=SMALLEST_AMAX) / LARGEST)
    numbers = (blocks / scale[..., None]).flatten(-2)[..., :C]
    return packed(codes(numbers)), scale


def dequantize_e5m6(data: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """See `nautile.ops.dequantize_e5m6`."""
    code = unpacked(data)
    # The code's 12 bits are the first of a float16.
    numbers = (code << 4).to(torch.int16).view(torch.float16).float()
    return (numbers * scale.repeat_interleave(block, -1)[..., : numbers.shape[-1]]).to(dtype)


def codes(x: Tensor) -> Tensor:
    """int32 in [0, 4096): sign, 5 bits of exponent, 6 of mantissa of numbers within ±65024."""
    size = x.abs().clamp(max=LARGEST)
    bits = size.view(torch.int32)
    # 17 of 23 bits of mantissa go; half of the last one that stays is added, less a bit unless that one is odd.
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) >> 17) - ((127 - 15) << 6)
    # Below 2^−14 the step is 2^−20, which is a float's at 8: adding 8 rounds.
    small = (size + 8.0).view(torch.int32) - 0x41000000  # the bits of 8.0
    return torch.where(size < 2.0**-14, small, normal) | ((x.view(torch.int32) >> 20) & 0x800)


def packed(code: Tensor) -> Tensor:
    """uint8 [..., C · 3 / 2] of codes [..., C]."""
    eight = code.long().unflatten(-1, (-1 if code.numel() else code.shape[-1] // 8, 8)).unbind(-1)
    words = []
    for first in (0, 32, 64):
        word = torch.zeros_like(eight[0])
        for place, value in zip(PLACES, eight, strict=True):
            shift = first + 32 - (place + 12)
            if -12 < shift < 32:
                word |= value << shift if shift >= 0 else value >> -shift
        words.append((word & 0xFFFFFFFF).to(torch.uint32))
    return torch.stack(words, -1).view(torch.uint8).flatten(-2)


def unpacked(data: Tensor) -> Tensor:
    """int32 codes [..., C] of bytes [..., C · 3 / 2]: each is in two neighbouring bytes of the number of 96 bits."""
    groups = data.shape[-1] // 12
    word = data.unflatten(-1, (groups, 3, 4)).flip(-1).flatten(-2).int()  # bytes from the highest
    found = [
        (word[..., place // 8] << 4 | word[..., place // 8 + 1] >> 4)
        if place % 8 == 0
        else ((word[..., place // 8] & 0xF) << 8 | word[..., place // 8 + 1])
        for place in PLACES
    ]
    return torch.stack(found, -1).flatten(-2)
