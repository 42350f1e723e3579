"""Numbers rounded to FP8 under one scale per block, and back.

    s_B = max(amax_{i ∈ B} |x_i|, 10⁻⁴) / 448,   x̂_i = e4m3(x_i · (1 / s_B)),   x_i ≈ x̂_i · s_B

(DeepSeek-V3, arXiv 2412.19437, §3.3.2: tiles of 1×128 for activations and gradients, blocks of 128×128 for weights.)
Rounding is to the nearest even. R rows, C columns; r, c those of a block B. None of this has a gradient.
"""

import torch
from torch import Tensor

from nautile.ops.checks import looks_at_values
from nautile.ops.dispatch import implementation
from nautile.ops.fp8_tensor import Block, Fp8Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_fp8(x: Tensor, block: Block = (1, 128), ue8m0: bool = False, transpose: bool = False) -> Fp8Tensor:
    """`x` in FP8, one scale per block.

    Args:
        x: float32, bfloat16 or float16 [..., R, C], any strides.
        block: (1, c), (r, 1) or (r, r); blocks at the edges are cut.
        ue8m0: Round scales up to powers of two, by which numbers can be multiplied without another rounding.
        transpose: Quantise xᵀ, in `block` of its own rows and columns: x [M, K] becomes [K, M] with a scale for 128
            of M, what the gradient of a weight multiplies.

    Returns:
        Row-major [..., R, C], or with `transpose` [..., C, R].

    Raises:
        ValueError: Other shapes, dtypes or blocks; NaN or infinity in `x`, looked for where that is cheap.
    """
    if x.dim() < 2 or x.dtype not in FLOATS:
        raise ValueError(
            f"quantize_fp8: x must be [..., R, C] of float32, bfloat16 or float16, got {x.dtype} {list(x.shape)}"
        )
    r, c = block
    if r < 1 or c < 1 or (r != 1 and c not in (1, r)):
        raise ValueError(f"quantize_fp8: block must be (1, c), (r, 1) or (r, r), got {block}")
    check_finite("quantize_fp8", x)
    x = x.detach()
    data, scale = implementation("quantize_fp8", x)(x.mT if transpose else x, block, ue8m0)
    return Fp8Tensor(data, scale, block)


def requantize_transposed(x: Fp8Tensor, ue8m0: bool = False) -> Fp8Tensor:
    """xᵀ in blocks (1, 128): what was quantised along its rows, quantised anew along its columns (V3 §3.5.2).

    The numbers are rounded a second time, so with `ue8m0` only those whose block has a larger power of two change, and
    only if `x` has such scales, too.

    Args:
        x: [..., R, C] in any blocks.
        ue8m0: As in `quantize_fp8`.

    Returns:
        Row-major [..., C, R].

    Raises:
        ValueError: Scales that are not finite, looked for where that is cheap.
    """
    check_finite("requantize_transposed", x.scale, "scale")
    block = (1, 128)
    data, scale = implementation("requantize_transposed", x.data)(x, block, ue8m0)
    return Fp8Tensor(data, scale, block)


def dequantize_fp8(x: Fp8Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``x̂_i · s_B`` in float32, rounded once to `dtype`: row-major [..., R, C].

    Raises:
        ValueError: `dtype` is none of float32, bfloat16, float16.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dequantize_fp8: dtype must be float32, bfloat16 or float16, got {dtype}")
    return implementation("dequantize_fp8", x.data)(x, dtype)


def check_finite(op: str, x: Tensor, name: str = "x") -> None:
    """Raise `ValueError` if `x` holds NaN or infinity; where looking is dear, the scales will tell."""
    if x.numel() and looks_at_values(x):
        low, high = x.aminmax()  # NaN if there is one; faster than isfinite
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError(f"{op}: {name} {list(x.shape)} holds NaN or infinity, which have no scale")
