"""Specification of `nautile.ops.gathered_attention` and `nautile.ops.selected_attention`."""

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype, compute_dtype, no_autocast
from nautile.ops.reference.attention import attend


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def gathered_attention(
    q_BSHC: Tensor, q_rope_BSHR: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, rows_BSK: Tensor, scale: float
) -> Tensor:
    """Gather, then attend. Unused places read row 0 as zeros and weigh nothing."""
    dtype, wide = compute_dtype(q_BSHC), accumulate_dtype(q_BSHC)
    if not c_BTC.shape[1]:
        c_BTC, k_rope_BTR = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (c_BTC, k_rope_BTR))
    unused_BSK = rows_BSK < 0
    sequence_B11 = torch.arange(c_BTC.shape[0], device=c_BTC.device)[:, None, None]
    rows_BSK = rows_BSK.clamp(min=0)
    c_BSKC = c_BTC[sequence_B11, rows_BSK].to(dtype).masked_fill(unused_BSK[..., None], 0.0)
    k_rope_BSKR = k_rope_BTR[sequence_B11, rows_BSK].to(dtype).masked_fill(unused_BSK[..., None], 0.0)
    with no_autocast(q_BSHC):
        q_BSHX = torch.cat([q_BSHC.to(dtype), q_rope_BSHR.to(dtype)], -1).to(wide) * scale
        k_BSKX = torch.cat([c_BSKC, k_rope_BSKR], -1).to(wide)
        scores_BSHK = torch.einsum("bshx,bskx->bshk", q_BSHX, k_BSKX)
    # The lowest number instead of −inf: a query without rows gets finite weights, which are then taken away.
    hidden_BSHK = unused_BSK[:, :, None]
    scores_BSHK = scores_BSHK.masked_fill(hidden_BSHK, torch.finfo(scores_BSHK.dtype).min)
    p_BSHK = scores_BSHK.softmax(-1).masked_fill(hidden_BSHK, 0.0).to(dtype)
    return torch.einsum("bshk,bskc->bshc", p_BSHK, c_BSKC)


def selected_attention(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, selected_BSS: Tensor, scale: float) -> Tensor:
    """Masked above the diagonal and where nothing was selected."""
    visible_BSS = selected_BSS & torch.ones(selected_BSS.shape[1:], dtype=torch.bool, device=q_BSHQ.device).tril()
    return attend(q_BSHQ, k_BSHQ, v_BSHV, scale, visible_BSS)
