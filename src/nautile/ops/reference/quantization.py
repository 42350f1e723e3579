"""Specification of the FP8 quantisers; bit for bit what DeepGEMM's casts give.

R rows, C columns; r, c those of a block.
"""

import torch
from torch import Tensor

from nautile.ops.fp8_tensor import LARGEST, Block, Fp8Tensor
from nautile.ops.reference.fp8_products import numbers
from nautile.ops.reference.scale_packing import ceil_to_ue8m0

SMALLEST_AMAX = 1e-4
"""Blocks of smaller numbers keep the scale of that one."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def quantize_fp8(x: Tensor, block: Block, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """(data, scale); see `nautile.ops.quantize_fp8`."""
    (r, c), (R, C) = block, x.shape[-2:]
    down, across = -(-R // r), -(-C // c)
    wide = x.contiguous().float()  # at once, a transpose takes a CPU ten times as long
    if R % r or C % c:
        wide = torch.nn.functional.pad(wide, (0, across * c - C, 0, down * r - R))
    blocks = wide.reshape(*x.shape[:-2], down, r, across, c)
    amax = torch.maximum(blocks.amax((-3, -1)), -blocks.amin((-3, -1)))  # |x| would be written, and read again
    scale = scale_of(amax, ue8m0)
    data = rounded(blocks * (1.0 / scale)[..., :, None, :, None]).reshape(wide.shape)
    return data[..., :R, :C].contiguous(), scale


def scale_of(amax: Tensor, ue8m0: bool) -> Tensor:
    """float32: the factor that brings numbers up to `amax` within those of FP8."""
    scale = amax.clamp(min=SMALLEST_AMAX) / LARGEST
    return ceil_to_ue8m0(scale) if ue8m0 else scale


def rounded(x: Tensor) -> Tensor:
    """float8_e4m3fn, nearest even; numbers out of range become the largest: a cast alone makes NaN of them on CUDA."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def requantize_transposed(x: Fp8Tensor, block: Block, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """(data, scale); see `nautile.ops.requantize_transposed`."""
    return quantize_fp8(numbers(x).mT, block, ue8m0)


def dequantize_fp8(x: Fp8Tensor, dtype: torch.dtype) -> Tensor:
    """See `nautile.ops.dequantize_fp8`."""
    return numbers(x).to(dtype).contiguous()
