"""Specification of `nautile.ops.store_latents` and of what its bytes stand for."""

import torch
from torch import Tensor

from nautile.ops.fp8_tensor import LARGEST
from nautile.ops.latent_layout import SMALLEST_SCALE, latent_parts, layout_of


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def store_latents(latents_TX: Tensor, cache_NPZ: Tensor, rows_T: Tensor) -> None:
    """Tile by tile scaled by the power of two from which on nothing overflows."""
    layout, parts = layout_of(cache_NPZ), latent_parts(cache_NPZ)
    kept_T = (rows_T >= 0) & (rows_T < cache_NPZ.shape[0] * cache_NPZ.shape[1])
    x_TX, rows_T = latents_TX[kept_T], rows_T[kept_T].long()
    page_T, place_T = rows_T // cache_NPZ.shape[1], rows_T % cache_NPZ.shape[1]
    tiles_TJY = x_TX[:, : layout.fp8].float().unflatten(1, (layout.tiles, layout.tile))
    scale_TJ = tile_scales(tiles_TJY.abs().amax(-1))
    e4m3_TF = (tiles_TJY / scale_TJ[..., None]).clamp(-LARGEST, LARGEST).flatten(1).to(torch.float8_e4m3fn)
    parts.fp8_NPF.view(torch.uint8)[page_T, place_T] = e4m3_TF.view(torch.uint8)
    if layout.planes:
        scale_TJ = scale_TJ.view(torch.int32).bitwise_right_shift(23).to(torch.uint8)
    parts.scale_NPJ[page_T, place_T] = scale_TJ
    parts.rope_NPR[page_T, place_T] = x_TX[:, layout.fp8 :].to(torch.bfloat16)


def tile_scales(amax_TJ: Tensor) -> Tensor:
    """``2^⌈log2(max(amax / 448, 1e-4))⌉`` in float32, from the bits: log2 in floating point may be a hair off."""
    scale_TJ = (amax_TJ / LARGEST).clamp_min(SMALLEST_SCALE)
    rounded_TJ = ((scale_TJ.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)
    return torch.where(scale_TJ.isnan(), scale_TJ, rounded_TJ)


def dequantize_rows(cache_NPZ: Tensor, rows_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows page · P + place of a cache, [T, X]: products in float32, rounded once."""
    layout = layout_of(cache_NPZ)
    parts, P = latent_parts(cache_NPZ), cache_NPZ.shape[1]
    page_T, place_T = rows_T // P, rows_T % P
    scale_TJ = parts.scale_NPJ[page_T, place_T]
    if layout.planes:
        scale_TJ = scale_TJ.view(torch.float8_e8m0fnu).float()
    fp8_TF = parts.fp8_NPF.view(torch.uint8)[page_T, place_T].view(torch.float8_e4m3fn)
    x_TF = fp8_TF.float() * scale_TJ.repeat_interleave(layout.tile, dim=1)
    return torch.cat([x_TF.to(dtype), parts.rope_NPR[page_T, place_T].to(dtype)], 1)
