"""sparse_mla_prefill over blocks of queries: memory stays at one block's, forward and backward. Kept for the backward:
inputs, output, and the logarithm of the softmax' denominator.

S queries, H heads, T rows, K places, V value, X = V + rotated part.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.rows import Block, blocks_of_queries, with_a_row
from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.precision import accumulate_dtype, compute_dtype, no_autocast
from nautile.ops.reference.sparse_prefill import valid_places

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
    rows_SK = rows_SK.where(valid_places(rows_SK, kv_TX.shape[0], topk_length_S), -1)
    if not rows_SK.shape[1]:
        rows_SK = rows_SK.new_full((rows_SK.shape[0], 1), -1)  # of no places there is no largest score
    return _SparsePrefill.apply(q_SHX, with_a_row(kv_TX), sink_H, rows_SK, scale, v_dim, compute_dtype(q_SHX))


class _SparsePrefill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_SHX: Tensor,
        kv_TX: Tensor,
        sink_H: Tensor | None,
        rows_SK: Tensor,
        scale: float,
        v_dim: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = accumulate_dtype(q_SHX)
        S, H, X = q_SHX.shape
        out_SHV = q_SHX.new_empty(S, H, v_dim, dtype=dtype)
        largest_SH, lse_SH, total_SH = (q_SHX.new_empty(S, H, dtype=wide) for _ in range(3))
        with no_autocast(q_SHX):
            for s in blocks_of_queries(S, rows_SK.shape[1], X + H):
                block = _block(q_SHX[s], kv_TX, rows_SK[s], v_dim, dtype, wide)
                scores_SHK = block.scores(scale)
                largest_SH[s] = scores_SHK.amax(-1)
                # +∞ where nothing is seen, from which every score is infinitely far away.
                lse_SH[s] = scores_SHK.logsumexp(-1).where(largest_SH[s] > float("-inf"), float("inf"))
                total_SH[s] = lse_SH[s] if sink_H is None else torch.logaddexp(lse_SH[s], sink_H.to(wide))
                p_SHK = scores_SHK.sub_(total_SH[s, :, None]).exp_()
                out_SHV[s] = torch.bmm(p_SHK, block.c_SKC)
        ctx.save_for_backward(q_SHX, kv_TX, sink_H, rows_SK, out_SHV, total_SH)
        ctx.scale, ctx.v_dim, ctx.dtype = scale, v_dim, dtype
        ctx.mark_non_differentiable(largest_SH, lse_SH)
        return out_SHV, largest_SH, lse_SH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SHV: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The sink's is −Σ_s exp(sink − total) Σ_v do o: it takes weight from every value."""
        q_SHX, kv_TX, sink_H, rows_SK, out_SHV, total_SH = ctx.saved_tensors
        dtype, wide, V = ctx.dtype, total_SH.dtype, ctx.v_dim
        (S, H, X), K = q_SHX.shape, rows_SK.shape[1]
        grad_q = q_SHX.new_empty(S, H, X)
        # Many queries add to one row: their sum is wider than what they add.
        grad_kv = kv_TX.new_zeros(kv_TX.shape, dtype=wide)
        grad_sink = None if sink_H is None else total_SH.new_zeros(H)
        with no_autocast(q_SHX):
            for s in blocks_of_queries(S, K, X + H):
                block = _block(q_SHX[s], kv_TX, rows_SK[s], V, dtype, wide)
                p_SHK = block.scores(ctx.scale).sub_(total_SH[s, :, None]).exp_()
                grad = grad_SHV[s].to(dtype).to(wide)
                grad_q[s, :, :V], grad_q[s, :, V:], into_c, into_k_rope = block.gradients(p_SHK, grad, ctx.scale)
                block.add_to_rows(grad_kv[:, :V], into_c)
                block.add_to_rows(grad_kv[:, V:], into_k_rope)
                if grad_sink is not None:
                    share_SH = (sink_H.to(wide) - total_SH[s]).exp().where(sink_H.isfinite(), 0.0)
                    grad_sink -= (share_SH * (grad * out_SHV[s]).sum(-1)).sum(0)
        return (
            grad_q, grad_kv.to(kv_TX.dtype), None if grad_sink is None else grad_sink.to(sink_H.dtype),
            None, None, None, None,
        )  # fmt: skip


def _block(q_SHX: Tensor, kv_TX: Tensor, rows_SK: Tensor, v_dim: int, dtype: torch.dtype, wide: torch.dtype) -> Block:
    """What is rounded to the compute dtype is multiplied in a wide one."""
    q, kv = q_SHX.to(dtype), kv_TX
    return Block.gathered(q[..., :v_dim], q[..., v_dim:], kv[:, :v_dim], kv[:, v_dim:], rows_SK, wide)
