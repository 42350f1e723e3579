"""Numbers of 12 bits: FP8's memory and a half, with three more bits of mantissa than E4M3.

    s_B = 2^⌈log2(max(amax_{i ∈ B} |x_i|, 10⁻⁴) / 65024)⌉,   x̂_i = e5m6(x_i / s_B),   x_i ≈ x̂_i · s_B

DeepSeek-V3 keeps the input of the projection after attention like that (arXiv 2412.19437, §3.5.2), since its backward
uses it, too. An E5M6 number is a float16 without its last four bits, rounded to the nearest even; the largest finite
one is 65024. Eight of them are three 32-bit words, the first in the highest bits of the first word, as TileKernels
packs them.

R rows, C columns. No part of this has a gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nautile.ops.dispatch import implementation
from nautile.ops.quantization import FLOATS, check_finite

LARGEST = 65024.0
"""Largest finite E5M6: 2^15 · (1 + 63/64)."""


@dataclass(frozen=True)
class E5m6Tensor:
    """``x ≈ e5m6(data) · scale``, a scale for each stretch of a row."""

    data: Tensor
    """uint8 [..., R, C · 3 / 2]."""
    scale: Tensor
    """float32 [..., R, ⌈C / block⌉], powers of two."""
    block: int
    """Columns that share a scale."""


def quantize_e5m6(x: Tensor, block: int = 128) -> E5m6Tensor:
    """`x` in 12 bits per number.

    Args:
        x: float32, bfloat16 or float16 [..., R, C], any strides, C a multiple of 8.
        block: Columns that share a scale, a multiple of 8; the last block of a row may be cut.

    Raises:
        ValueError: Other shapes or dtypes; NaN or infinity in `x`, looked for where that is cheap.
    """
    if x.dim() < 2 or x.dtype not in FLOATS or x.shape[-1] % 8:
        raise ValueError(
            "quantize_e5m6: x must be [..., R, C] of float32, bfloat16 or float16 with C a multiple of 8, "
            f"got {x.dtype} {list(x.shape)}"
        )
    if block < 8 or block % 8:
        raise ValueError(f"quantize_e5m6: block must be a positive multiple of 8, got {block}")
    check_finite("quantize_e5m6", x)
    x = x.detach()
    data, scale = implementation("quantize_e5m6", x)(x, block)
    return E5m6Tensor(data, scale, block)


def dequantize_e5m6(x: E5m6Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``x̂ · s`` in float32, rounded once to `dtype`: [..., R, C].

    Raises:
        ValueError: `dtype` is none of float32, bfloat16, float16.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dequantize_e5m6: dtype must be float32, bfloat16 or float16, got {dtype}")
    return implementation("dequantize_e5m6", x.scale)(x.data, x.scale, x.block, dtype)
