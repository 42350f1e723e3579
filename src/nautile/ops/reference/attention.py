"""Specification of `nautile.ops.causal_attention`."""

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype, compute_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def causal_attention(
    q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, scale: float, document_ids_BS: Tensor | None = None
) -> Tensor:
    """All S × S scores at once, masked above the diagonal and across documents."""
    dtype = compute_dtype(q_BSHQ)
    q_BSHQ, k_BSHQ, v_BSHV = q_BSHQ.to(dtype), k_BSHQ.to(dtype), v_BSHV.to(dtype)
    S = q_BSHQ.shape[1]
    scores_BHST = torch.einsum("bshq,bthq->bhst", q_BSHQ, k_BSHQ).to(accumulate_dtype(q_BSHQ)) * scale
    visible = torch.ones(S, S, dtype=torch.bool, device=q_BSHQ.device).tril()
    if document_ids_BS is not None:
        visible = visible & (document_ids_BS[:, None, :, None] == document_ids_BS[:, None, None, :])
    p_BHST = scores_BHST.masked_fill(~visible, float("-inf")).softmax(-1).to(dtype)
    return torch.einsum("bhst,bthv->bshv", p_BHST, v_BSHV)
