"""Specification of `nautile.ops.causal_attention`."""

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype, compute_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def causal_attention(
    q_BSHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, scale: float, document_ids_BS: Tensor | None = None
) -> Tensor:
    """All S × S scores at once, masked above the diagonal and across documents. J query heads share a key head."""
    dtype = compute_dtype(q_BSHQ)
    q_BSHQ, k_BSGQ, v_BSGV = q_BSHQ.to(dtype), k_BSGQ.to(dtype), v_BSGV.to(dtype)
    S = q_BSHQ.shape[1]
    q_BSGJQ = q_BSHQ.unflatten(2, (k_BSGQ.shape[2], -1))
    scores_BGJST = torch.einsum("bsgjq,btgq->bgjst", q_BSGJQ, k_BSGQ).to(accumulate_dtype(q_BSHQ)) * scale
    visible = torch.ones(S, S, dtype=torch.bool, device=q_BSHQ.device).tril()
    if document_ids_BS is not None:
        visible = visible & (document_ids_BS[:, None, None, :, None] == document_ids_BS[:, None, None, None, :])
    p_BGJST = scores_BGJST.masked_fill(~visible, float("-inf")).softmax(-1).to(dtype)
    return torch.einsum("bgjst,btgv->bsgjv", p_BGJST, v_BSGV).flatten(2, 3)
