"""The indexer's paged FP8 cache, byte for byte that of DeepGEMM: a page is Y keys of I bytes, then their Y scales.

P pages of Y tokens, I dimensions of a key, Z = I + 4 bytes per token.
"""

import torch
from torch import Tensor

SCALE_BYTES = 4
"""One float32 scale per key."""


def index_planes(cache_PYZ: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The two parts of every page, as views: e4m3 keys [P, Y, I] and float32 scales [P, Y].

    Raises:
        ValueError: The cache is not uint8 [P, Y, I + 4] of whole pages with 4-byte aligned beginnings.
    """
    shape_fits = cache_PYZ.dim() == 3 and cache_PYZ.dtype == torch.uint8 and cache_PYZ.shape[2] == width + SCALE_BYTES
    if not shape_fits or cache_PYZ.stride()[1:] != (width + SCALE_BYTES, 1):
        raise ValueError(
            f"cache must be uint8 [P, Y, I + {SCALE_BYTES}] with I = {width} and no gaps within a page, got "
            f"{cache_PYZ.dtype} {list(cache_PYZ.shape)} of strides {cache_PYZ.stride()}"
        )
    if cache_PYZ.stride(0) % SCALE_BYTES or cache_PYZ.storage_offset() % SCALE_BYTES:
        raise ValueError(
            f"cache must begin every page at a multiple of {SCALE_BYTES} bytes, got stride {cache_PYZ.stride(0)} and "
            f"offset {cache_PYZ.storage_offset()}"
        )
    P, Y = cache_PYZ.shape[:2]
    bytes_PX = cache_PYZ.as_strided((P, Y * (width + SCALE_BYTES)), (cache_PYZ.stride(0), 1))
    keys_PYI = bytes_PX[:, : Y * width].unflatten(1, (Y, width)).view(torch.float8_e4m3fn)
    return keys_PYI, bytes_PX[:, Y * width :].view(torch.float32)
