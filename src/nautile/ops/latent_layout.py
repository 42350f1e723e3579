"""MLA latents in FP8 as FlashMLA's sparse decoding reads them, byte for byte: two layouts of a page.

A latent is F numbers without position and R rotated ones. The former are quantised in tiles, each with a scale; the
latter stay bfloat16:

    x_f ≈ e4m3_f · s_j,   s_j = 2^⌈log2 max(max_f |x_f| / 448, 1e-4)⌉ over f in tile j

N pages of P places, X = F + R dimensions, J tiles, Z bytes of a place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-4
"""Scales are no smaller than the next power of two."""


@dataclass(frozen=True)
class LatentLayout:
    """Where the bytes of a token are in its page."""

    name: str
    fp8: int
    """F: dimensions in FP8, the first ones."""
    tile: int
    """Dimensions that share a scale."""
    rope: int = 64
    """R: dimensions in bfloat16, the last ones."""
    planes: bool = False
    """False: a token's bytes are e4m3 [F], float32 scales [J], bfloat16 [R]. True: a page has e4m3 [F] and
    bfloat16 [R] of all its tokens, then 8 bytes per token: J scales as exponents (UE8M0), and padding."""

    @property
    def width(self) -> int:
        """X: dimensions of a latent."""
        return self.fp8 + self.rope

    @property
    def tiles(self) -> int:
        """J: scales of a latent."""
        return self.fp8 // self.tile

    @property
    def bytes(self) -> int:
        """Z: bytes of a token, all told."""
        return self.fp8 + 2 * self.rope + (8 if self.planes else 4 * self.tiles)

    @property
    def alignment(self) -> int:
        """What a page's first byte must be a multiple of."""
        return 8 if self.planes else 16


ROWS = LatentLayout("656-byte rows", fp8=512, tile=128)
"""DeepSeek-V3.2: X = 576."""
PLANES = LatentLayout("584-byte planes", fp8=448, tile=64, planes=True)
"""FlashMLA's second layout ("MODEL1" there): X = 512."""
MOST_VALUES = 512
"""Dimensions of either layout that can be a value."""
PAGE_MULTIPLE = 576
"""FlashMLA begins every page of `PLANES` at a multiple of so many bytes."""


@dataclass(frozen=True)
class LatentParts:
    """Views into a cache of bytes."""

    fp8_NPF: Tensor
    """float8_e4m3fn."""
    scale_NPJ: Tensor
    """float32, or uint8: a power of two as its exponent + 127."""
    rope_NPR: Tensor
    """bfloat16."""


def layout_of(cache_NPZ: Tensor, name: str = "cache") -> LatentLayout:
    """The layout that has places of so many bytes.

    Raises:
        ValueError: Neither has, pages have gaps, or begin at odd addresses.
    """
    layout = {layout.bytes: layout for layout in (ROWS, PLANES)}.get(cache_NPZ.shape[-1] if cache_NPZ.dim() == 3 else 0)
    if layout is None or cache_NPZ.dtype not in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        raise ValueError(
            f"{name} must be bytes (uint8, int8 or float8_e4m3fn) [N, P, {ROWS.bytes}] or [N, P, {PLANES.bytes}], "
            f"got {cache_NPZ.dtype} {list(cache_NPZ.shape)}"
        )
    if cache_NPZ.numel() and cache_NPZ.stride()[1:] != (layout.bytes, 1):
        raise ValueError(f"{name}: a page of {layout.name} must have no gaps, got strides {cache_NPZ.stride()}")
    if cache_NPZ.stride(0) % layout.alignment or cache_NPZ.storage_offset() % layout.alignment:
        raise ValueError(
            f"{name}: pages of {layout.name} must begin at multiples of {layout.alignment} bytes, got stride "
            f"{cache_NPZ.stride(0)} and offset {cache_NPZ.storage_offset()}"
        )
    return layout


def latent_parts(cache_NPZ: Tensor) -> LatentParts:
    """What a cache holds, as views: writing to them writes the cache.

    Raises:
        ValueError: As `layout_of`.
    """
    layout = layout_of(cache_NPZ)
    N, P = cache_NPZ.shape[:2]
    F, J, R = layout.fp8, layout.tiles, layout.rope
    page_NY = cache_NPZ.view(torch.uint8).as_strided((N, P * layout.bytes), (cache_NPZ.stride(0), 1))
    if layout.planes:
        data_NPY = page_NY[:, : P * (F + 2 * R)].unflatten(1, (P, F + 2 * R))
        scale_NPJ = page_NY[:, P * (F + 2 * R) :].unflatten(1, (P, 8))[:, :, :J]
        return LatentParts(
            data_NPY[..., :F].view(torch.float8_e4m3fn), scale_NPJ, data_NPY[..., F:].view(torch.bfloat16)
        )
    data_NPZ = page_NY.unflatten(1, (P, layout.bytes))
    fp8_NPF, scale_NPY, rope_NPY = data_NPZ.split((F, 4 * J, 2 * R), -1)
    return LatentParts(fp8_NPF.view(torch.float8_e4m3fn), scale_NPY.view(torch.float32), rope_NPY.view(torch.bfloat16))


def empty_latent_cache(pages: int, places: int, layout: LatentLayout, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [pages, places, Z], uninitialised, pages beginning where FlashMLA wants them."""
    multiple = PAGE_MULTIPLE if layout.planes else layout.alignment
    stride = -(-places * layout.bytes // multiple) * multiple
    room = torch.empty(pages * stride, dtype=torch.uint8, device=device)
    return room.as_strided((pages, places, layout.bytes), (stride, layout.bytes, 1))
