"""Specification of `nautile.ops.cached_attention` and `nautile.ops.latent_attention`."""

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype, compute_dtype, no_autocast
from nautile.ops.reference.attention import attend


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def cached_attention(
    q_BSHQ: Tensor,
    k_BTGQ: Tensor,
    v_BTGV: Tensor,
    positions_BS: Tensor,
    scale: float,
    selected_BST: Tensor | None = None,
) -> Tensor:
    """One mask for what comes later and what was not selected."""
    seen_BST = seen(positions_BS, k_BTGQ.shape[1])
    k_BTGQ, v_BTGV = without_unread(k_BTGQ, positions_BS), without_unread(v_BTGV, positions_BS)
    visible_BST = seen_BST if selected_BST is None else seen_BST & selected_BST
    return attend(q_BSHQ, k_BTGQ, v_BTGV, scale, visible_BST)


def latent_attention(
    q_BSHC: Tensor, q_rope_BSHR: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, positions_BS: Tensor, scale: float
) -> Tensor:
    """All S × H × T scores at once, in float32 or better."""
    dtype, wide = compute_dtype(q_BSHC), accumulate_dtype(q_BSHC)
    k_BTX = without_unread(torch.cat([c_BTC.to(dtype), k_rope_BTR.to(dtype)], -1), positions_BS)
    with no_autocast(q_BSHC):
        q_BSHX = torch.cat([q_BSHC.to(dtype), q_rope_BSHR.to(dtype)], -1).to(wide) * scale
        scores_BSHT = torch.einsum("bshx,btx->bsht", q_BSHX, k_BTX.to(wide))
        hidden_BS1T = ~seen(positions_BS, k_BTX.shape[1])[:, :, None]
        p_BSHT = scores_BSHT.masked_fill(hidden_BS1T, float("-inf")).softmax(-1).to(dtype)
        return torch.einsum("bsht,btc->bshc", p_BSHT, k_BTX[..., : c_BTC.shape[-1]])


def seen(positions_BS: Tensor, T: int) -> Tensor:
    """Boolean [B, S, T]: rows up to each query's position."""
    return torch.arange(T, device=positions_BS.device) <= positions_BS[..., None]


def without_unread(rows_BTX: Tensor, positions_BS: Tensor) -> Tensor:
    """Zeros where no query of the sequence looks: 0 · NaN is NaN, so what weighs nothing must still be a number."""
    unread_BT = torch.arange(rows_BTX.shape[1], device=rows_BTX.device) > positions_BS.amax(1, keepdim=True)
    return rows_BTX.masked_fill(unread_BT.view(*unread_BT.shape, *[1] * (rows_BTX.dim() - 2)), 0.0)
