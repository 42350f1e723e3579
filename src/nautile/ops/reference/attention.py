"""Specification of `nautile.ops.causal_attention`.

The softmax and its two products are torch's own: on every device it keeps scores of narrow dtypes in float32 (in
float16 they overflow, unscaled, from the key biases of a Qwen2), and on a GPU none of them goes to memory.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile.ops.precision import compute_dtype, no_autocast


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def causal_attention(
    q_BSHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, scale: float, document_ids_BS: Tensor | None = None
) -> Tensor:
    """Masked above the diagonal and across documents."""
    if document_ids_BS is None:
        return attend(q_BSHQ, k_BSGQ, v_BSGV, scale)
    earlier_SS = torch.ones(q_BSHQ.shape[1], q_BSHQ.shape[1], dtype=torch.bool, device=q_BSHQ.device).tril()
    same_BSS = document_ids_BS[:, :, None] == document_ids_BS[:, None, :]
    return attend(q_BSHQ, k_BSGQ, v_BSGV, scale, earlier_SS & same_BSS)


def attend(q_BSHQ: Tensor, k_BTGQ: Tensor, v_BTGV: Tensor, scale: float, visible_BST: Tensor | None = None) -> Tensor:
    """softmax(scale · q kᵀ) v where `visible_BST` is True; causal, with S = T, if it is None."""
    dtype = compute_dtype(q_BSHQ)
    q_BHSQ, k_BGTQ, v_BGTV = (x.to(dtype).transpose(1, 2) for x in (q_BSHQ, k_BTGQ, v_BTGV))
    with no_autocast(q_BSHQ):
        o_BHSV = F.scaled_dot_product_attention(
            q_BHSQ,
            k_BGTQ,
            v_BGTV,
            attn_mask=None if visible_BST is None else visible_BST[:, None],
            is_causal=visible_BST is None,
            scale=scale,
            enable_gqa=q_BHSQ.shape[1] != k_BGTQ.shape[1],
        )
    return o_BHSV.transpose(1, 2)
