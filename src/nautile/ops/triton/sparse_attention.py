"""Sparse attention in Triton: gathered rows as `sparse_mla_prefill`, selected positions as one more mask of causal
attention. Probabilities are computed again in the backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.precision import compute_dtype
from nautile.ops.triton.flash import Masks, attend
from nautile.ops.triton.rows import Operands, backward_queries, backward_rows, deltas, forward
from nautile.ops.triton.support import floats as why_not

__all__ = ["gathered_attention", "selected_attention", "why_not"]


def selected_attention(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, selected_BSS: Tensor, scale: float) -> Tensor:
    """See `nautile.ops.selected_attention`."""
    return attend(q_BSHQ, k_BSHQ, v_BSHV, scale, Masks(selected_BSS=selected_BSS.contiguous().view(torch.uint8)))


def gathered_attention(
    q_BSHC: Tensor, q_rope_BSHR: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, rows_BSK: Tensor, scale: float
) -> Tensor:
    """See `nautile.ops.gathered_attention`."""
    return _GatheredAttention.apply(q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR, rows_BSK, scale, compute_dtype(q_BSHC))


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHC: Tensor,
        q_rope_BSHR: Tensor,
        c_BTC: Tensor,
        k_rope_BTR: Tensor,
        rows_BSK: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        tensors = (q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR)
        out, _, lse_BSH = forward(Operands.of(tensors, rows_BSK, None, dtype), None, scale)
        ctx.save_for_backward(*tensors, rows_BSK, out, lse_BSH)
        ctx.scale, ctx.dtype = scale, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHC: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, rows_BSK, out, lse_BSH = ctx.saved_tensors
        operands = Operands.of(tuple(tensors), rows_BSK, None, ctx.dtype)
        grad = grad_BSHC.to(ctx.dtype).contiguous()
        delta_BSH = deltas(grad, out)
        grad_q = grad_q_rope = grad_c = grad_k_rope = None
        if any(ctx.needs_input_grad[:2]):
            grad_q, grad_q_rope = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors[:2])
            backward_queries(operands, grad, lse_BSH, delta_BSH, grad_q, grad_q_rope, ctx.scale)
        if any(ctx.needs_input_grad[2:4]):
            both, C = backward_rows(operands, grad, lse_BSH, delta_BSH, ctx.scale), tensors[2].shape[2]
            grad_c, grad_k_rope = both[..., :C].to(tensors[2].dtype), both[..., C:].to(tensors[3].dtype)
        return grad_q, grad_q_rope, grad_c, grad_k_rope, None, None, None
