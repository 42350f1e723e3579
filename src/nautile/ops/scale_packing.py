"""Scales as kernels want to read them: powers of two in a byte each, and matrices that a TMA can load columns of.

A scale s = 2^n is one byte in UE8M0, n + 127, the exponent of the float32. Four of them, neighbours along K, share an
int32, the first in its lowest byte.

M rows of a matrix (or N, of its other factor), J blocks of K.
"""

import torch
from torch import Tensor

from nautile.ops.checks import looks_at_values
from nautile.ops.dispatch import implementation
from nautile.ops.reference.scale_packing import ceil_to_ue8m0, pack_ue8m0, unpack_ue8m0

__all__ = ["ceil_to_ue8m0", "mn_major_scales", "pack_ue8m0", "tma_aligned", "unpack_ue8m0"]

TMA_BYTES = 16
"""What the address and every stride but the innermost of a tensor map are multiples of."""


def tma_aligned(elements: int, itemsize: int) -> int:
    """The smallest number ≥ `elements` of elements that fill whole units of 16 bytes."""
    unit = TMA_BYTES // itemsize
    return -(-elements // unit) * unit


def mn_major_scales(scale_MJ: Tensor, packed: bool = False) -> Tensor:
    """The same scales with M innermost, each block's column padded to whole units of 16 bytes (with zeros).

    Args:
        scale_MJ: float32 [..., M, J], any strides.
        packed: As UE8M0, four blocks to an int32; the scales are powers of two.

    Returns:
        float32 [..., M, J], or int32 [..., M, ⌈J / 4⌉], with strides (…, 1, M rounded up to a multiple of 4).
        `scale_MJ` itself if it is laid out like that.

    Raises:
        ValueError: Another dtype or shape; scales to pack that are no powers of two, looked for where that is cheap.
    """
    if scale_MJ.dim() < 2 or scale_MJ.dtype != torch.float32:
        raise ValueError(
            f"mn_major_scales: scale must be float32 [..., M, J], got {scale_MJ.dtype} {list(scale_MJ.shape)}"
        )
    if packed:
        if looks_at_values(scale_MJ):
            bits = scale_MJ.contiguous().view(torch.int32)
            if not ((bits >= 0) & (bits & 0x7FFFFF == 0)).all():
                raise ValueError("mn_major_scales: scales to pack must be powers of two; quantise with ue8m0=True")
    elif _is_mn_major(scale_MJ):
        return scale_MJ
    return implementation("mn_major_scales", scale_MJ)(scale_MJ.detach(), packed)


def _is_mn_major(x: Tensor) -> bool:
    column = tma_aligned(x.shape[-2], 4)
    want = [column * x.shape[-1]]
    for size in x.shape[-3:0:-1]:
        want.insert(0, want[0] * size)
    return list(x.stride()) == [*want[: x.dim() - 2], 1, column]
