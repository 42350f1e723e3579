"""Writing latents into a cache of bytes, as `latent_layout` lays them out.

N pages of P places, X dimensions, Z bytes of a place, T tokens.
"""

import torch
from torch import Tensor

from nautile.ops.checks import same_device
from nautile.ops.dispatch import implementation
from nautile.ops.latent_layout import PLANES, ROWS, empty_latent_cache, layout_of

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def store_latents(latents_TX: Tensor, cache_NPZ: Tensor, rows_T: Tensor) -> None:
    """Quantise latents and write them to places of a cache.

    A tile with a NaN or an infinity becomes NaN or worse, alone. Places that are named twice hold either latent.

    Args:
        latents_TX: bfloat16, float16 or float32.
        cache_NPZ: Written, in the layout of X dimensions.
        rows_T: int32 or int64 page · P + place; negative or beyond the cache: not stored.

    Raises:
        ValueError: Shapes, dtypes, layouts or devices do not fit together.
    """
    layout = layout_of(cache_NPZ, "store_latents: cache")
    if latents_TX.dim() != 2 or latents_TX.shape[1] != layout.width or latents_TX.dtype not in FLOATS:
        raise ValueError(
            f"store_latents: latents must be bfloat16, float16 or float32 [T, {layout.width}] for {layout.name}, got "
            f"{latents_TX.dtype} {list(latents_TX.shape)}"
        )
    if rows_T.shape != latents_TX.shape[:1] or rows_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"store_latents: rows must be int32 or int64 [T] = {list(latents_TX.shape[:1])}, got {rows_T.dtype} "
            f"{list(rows_T.shape)}"
        )
    same_device("store_latents", latents=latents_TX, cache=cache_NPZ, rows=rows_T)
    implementation("store_latents", latents_TX)(latents_TX, cache_NPZ, rows_T)


def quantize_latents(latents_NPX: Tensor) -> Tensor:
    """A new cache, uint8 [N, P, Z], of latents [N, P, X]; X says in which layout.

    Raises:
        ValueError: X is none of 576 and 512; else as `store_latents`.
    """
    layout = {layout.width: layout for layout in (ROWS, PLANES)}.get(latents_NPX.shape[-1])
    if layout is None or latents_NPX.dim() != 3:
        raise ValueError(
            f"quantize_latents: latents must be [N, P, {ROWS.width}] or [N, P, {PLANES.width}], got "
            f"{list(latents_NPX.shape)}"
        )
    N, P = latents_NPX.shape[:2]
    cache_NPZ = empty_latent_cache(N, P, layout, latents_NPX.device)
    store_latents(latents_NPX.flatten(0, 1), cache_NPZ, torch.arange(N * P, device=latents_NPX.device))
    return cache_NPZ
