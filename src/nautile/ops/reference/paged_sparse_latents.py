"""Specification of `nautile.ops.paged_sparse_mla_decode`."""

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype
from nautile.ops.reference.latent_bytes import dequantize_rows
from nautile.ops.reference.paged_latents import softmax_and_lse
from nautile.ops.split_kv import Splits

Scope = tuple[Tensor, Tensor, Tensor | None]
"""A cache [N, P, Z], choices from it [B, S, K], how many of them count [B]."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def paged_sparse_mla_decode(
    q_BSHX: Tensor, scopes: list[Scope], scale: float, v_dim: int, sink_H: Tensor | None, splits: Splits | None
) -> tuple[Tensor, Tensor]:
    """Gathers all choices, those of both caches side by side, in float32 or better."""
    wide = accumulate_dtype(q_BSHX)
    gathered = [_chosen(*scope, q_BSHX.dtype) for scope in scopes]
    k_BSKX = torch.cat([k for k, _ in gathered], 2).to(wide)
    valid_BSK = torch.cat([valid for _, valid in gathered], 2)
    scores_BSHK = scale * torch.einsum("bshx,bskx->bshk", q_BSHX.to(wide), k_BSKX)
    p_BSHK, lse_BSH = softmax_and_lse(scores_BSHK.masked_fill(~valid_BSK[:, :, None], float("-inf")))
    o_BSHV = torch.einsum("bshk,bskv->bshv", p_BSHK, k_BSKX[..., :v_dim])
    if sink_H is not None:
        o_BSHV = o_BSHV * torch.sigmoid(lse_BSH - sink_H.to(wide)).nan_to_num(0.0)[..., None]
    return o_BSHV.to(q_BSHX.dtype), lse_BSH.transpose(1, 2)


def _chosen(cache_NPZ: Tensor, rows_BSK: Tensor, lengths_B: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Chosen latents, 0 where nothing was chosen, and where something was."""
    (N, P, _), K = cache_NPZ.shape, rows_BSK.shape[2]
    valid_BSK = (rows_BSK >= 0) & (rows_BSK < N * P)
    if lengths_B is not None:
        valid_BSK = valid_BSK & (torch.arange(K, device=rows_BSK.device) < lengths_B[:, None, None])
    x_VX = dequantize_rows(cache_NPZ, rows_BSK[valid_BSK].long(), dtype)
    k_BSKX = x_VX.new_zeros(*rows_BSK.shape, x_VX.shape[1])
    k_BSKX[valid_BSK] = x_VX
    return k_BSKX, valid_BSK
