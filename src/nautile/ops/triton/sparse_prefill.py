"""sparse_mla_prefill in Triton, forward and backward. Only inputs, output and two numbers per query and head are kept.

S queries, H heads, T rows, K places, V value, X = V + rotated part.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.precision import compute_dtype
from nautile.ops.triton.rows import Operands, backward_queries, backward_rows, deltas, forward
from nautile.ops.triton.support import floats as why_not

__all__ = ["sparse_mla_prefill", "why_not"]


def sparse_mla_prefill(
    q_SHX: Tensor,
    kv_TX: Tensor,
    rows_SK: Tensor,
    scale: float,
    v_dim: int,
    sink_H: Tensor | None = None,
    topk_length_S: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `nautile.ops.sparse_mla_prefill`."""
    dtype = compute_dtype(q_SHX)
    return _SparsePrefill.apply(q_SHX, kv_TX, sink_H, rows_SK, topk_length_S, scale, v_dim, dtype)


class _SparsePrefill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_SHX: Tensor,
        kv_TX: Tensor,
        sink_H: Tensor | None,
        rows_SK: Tensor,
        topk_length_S: Tensor | None,
        scale: float,
        v_dim: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        operands = _operands(q_SHX, kv_TX, rows_SK, topk_length_S, v_dim, dtype)
        out, largest, lse = (x[0] for x in forward(operands, None if sink_H is None else sink_H.float(), scale))
        ctx.save_for_backward(q_SHX, kv_TX, sink_H, rows_SK, topk_length_S, out, lse)
        ctx.scale, ctx.v_dim, ctx.dtype = scale, v_dim, dtype
        ctx.mark_non_differentiable(largest, lse)
        return out, largest, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SHV: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The sink's is −Σ_s exp(sink − lse) δ: it takes weight from every value."""
        q_SHX, kv_TX, sink_H, rows_SK, topk_length_S, out, lse_SH = ctx.saved_tensors
        operands = _operands(q_SHX, kv_TX, rows_SK, topk_length_S, ctx.v_dim, ctx.dtype)
        grad_SHV = grad_SHV.to(ctx.dtype).contiguous()
        delta_SH = deltas(grad_SHV, out)
        grad_sink = None
        if sink_H is not None:
            lse_SH = torch.logaddexp(lse_SH, sink_H.float())
            share_SH = (sink_H.float() - lse_SH).exp().where(sink_H.isfinite(), 0.0)
            grad_sink = (-share_SH * delta_SH).sum(0).to(sink_H.dtype)
        grad, lse, delta = grad_SHV[None], lse_SH[None].contiguous(), delta_SH[None]
        grad_q = grad_kv = None
        if ctx.needs_input_grad[0]:
            grad_q = torch.empty_like(q_SHX, memory_format=torch.contiguous_format)
            parts = grad_q[None, ..., : ctx.v_dim], grad_q[None, ..., ctx.v_dim :]
            backward_queries(operands, grad, lse, delta, *parts, ctx.scale)
        if ctx.needs_input_grad[1]:
            grad_kv = backward_rows(operands, grad, lse, delta, ctx.scale)[0].to(kv_TX.dtype)
        return grad_q, grad_kv, grad_sink, None, None, None, None, None


def _operands(
    q_SHX: Tensor, kv_TX: Tensor, rows_SK: Tensor, topk_length_S: Tensor | None, v_dim: int, dtype: torch.dtype
) -> Operands:
    q, kv = q_SHX[None], kv_TX[None]
    tensors = (q[..., :v_dim], q[..., v_dim:], kv[..., :v_dim], kv[..., v_dim:])
    return Operands.of(tensors, rows_SK[None], None if topk_length_S is None else topk_length_S[None], dtype)
