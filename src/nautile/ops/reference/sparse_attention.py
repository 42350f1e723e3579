"""Specification of `nautile.ops.gathered_attention` and `nautile.ops.selected_attention`."""

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype, compute_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def gathered_attention(
    q_BSHC: Tensor, q_rope_BSHR: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, rows_BSK: Tensor, scale: float
) -> Tensor:
    """Gather, then attend. Unused places read row 0 as zeros and weigh nothing."""
    dtype = compute_dtype(q_BSHC)
    unused_BSK = rows_BSK < 0
    sequence_B11 = torch.arange(c_BTC.shape[0], device=c_BTC.device)[:, None, None]
    rows_BSK = rows_BSK.clamp(min=0)
    c_BSKC = c_BTC[sequence_B11, rows_BSK].to(dtype).masked_fill(unused_BSK[..., None], 0.0)
    k_rope_BSKR = k_rope_BTR[sequence_B11, rows_BSK].to(dtype).masked_fill(unused_BSK[..., None], 0.0)
    scores_BSHK = torch.einsum("bshc,bskc->bshk", q_BSHC.to(dtype), c_BSKC)
    scores_BSHK = scores_BSHK + torch.einsum("bshr,bskr->bshk", q_rope_BSHR.to(dtype), k_rope_BSKR)
    scores_BSHK = scores_BSHK.to(accumulate_dtype(q_BSHC)) * scale
    # The lowest number instead of −inf: a query without rows gets finite weights, which are then taken away.
    hidden_BSHK = unused_BSK[:, :, None]
    scores_BSHK = scores_BSHK.masked_fill(hidden_BSHK, torch.finfo(scores_BSHK.dtype).min)
    p_BSHK = scores_BSHK.softmax(-1).masked_fill(hidden_BSHK, 0.0).to(dtype)
    return torch.einsum("bshk,bskc->bshc", p_BSHK, c_BSKC)


def selected_attention(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, selected_BSS: Tensor, scale: float) -> Tensor:
    """All S × S scores at once, masked above the diagonal and where nothing was selected."""
    dtype = compute_dtype(q_BSHQ)
    scores_BHST = (
        torch.einsum("bshq,bthq->bhst", q_BSHQ.to(dtype), k_BSHQ.to(dtype)).to(accumulate_dtype(q_BSHQ)) * scale
    )
    visible_BSS = selected_BSS & torch.ones(selected_BSS.shape[1:], dtype=torch.bool, device=q_BSHQ.device).tril()
    p_BHST = scores_BHST.masked_fill(~visible_BSS[:, None], float("-inf")).softmax(-1).to(dtype)
    return torch.einsum("bhst,bthv->bshv", p_BHST, v_BSHV.to(dtype))
