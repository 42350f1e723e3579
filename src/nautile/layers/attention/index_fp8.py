"""What the indexer's queries and keys lose when they are multiplied in FP8, as DeepSeek's V3.2-Exp code does it.

Each head vector is rotated by a Hadamard matrix, so that no dimension stands out, and then rounded with one scale:

    x ← H x · I^−½,   s = 2^⌈log2(max(amax|x|, 1e−4) / 448)⌉,   x ← s · float32(e4m3(clamp(x / s, ±448)))

with H in Sylvester order. H is orthogonal, so without the rounding q·k is what it was. Scales are powers of two
(``ue8m0``), so the rounded vectors are exact in bfloat16, and multiplying them is multiplying the FP8 numbers.
"""

from typing import Any

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype
from nautile.ops.reference.quantization import rounded, scale_of


def hadamard(x: Tensor) -> Tensor:
    """H x · I^−½ over the last dimension, I a power of two: summed in float32 or better, in the dtype of x.

    H_1 = (1), H_2n = [[H_n, H_n], [H_n, −H_n]]: log2 I sweeps of sums and differences instead of a product.
    """
    width = x.shape[-1]
    y, half = x.to(accumulate_dtype(x)), 1
    while half < width:
        first, second = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return (y * width**-0.5).to(x.dtype)


def fp8_rounded(x: Tensor) -> Tensor:
    """Each vector of the last dimension rounded to e4m3 under one power-of-two scale; same dtype and shape."""
    wide = x.float()
    scale = scale_of(wide.abs().amax(-1, keepdim=True), ue8m0=True)
    return (rounded(wide / scale).float() * scale).to(x.dtype)


def as_stored_in_fp8(x: Tensor) -> Tensor:
    """Rotation, then rounding, through which gradients pass unchanged."""
    return _Rounded.apply(hadamard(x))


class _Rounded(torch.autograd.Function):
    """Autograd's own gradient of a cast to FP8 is rounded to FP8 itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return fp8_rounded(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyrefly: ignore
        return grad
