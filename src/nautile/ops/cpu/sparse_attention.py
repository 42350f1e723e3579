"""Sparse attention over blocks of queries. Only inputs are kept for the backward pass, which computes the
probabilities again: memory stays at one block's.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.rows import Block, blocks_of_queries, with_a_row
from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.precision import accumulate_dtype, compute_dtype, no_autocast

__all__ = ["gathered_attention", "selected_attention", "why_not"]

BLOCK = 64
"""Queries of one block of `selected_attention`."""
SCORES = 1 << 20
"""Scores of one block of it that exist at once, a few heads': 4 MiB in float32."""


def gathered_attention(
    q_BSHC: Tensor, q_rope_BSHR: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, rows_BSK: Tensor, scale: float
) -> Tensor:
    """See `nautile.ops.gathered_attention`."""
    c_BTC, k_rope_BTR = with_a_row(c_BTC), with_a_row(k_rope_BTR)
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
        inputs = (q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR)
        ctx.save_for_backward(*inputs, rows_BSK)
        ctx.scale, ctx.dtype = scale, dtype
        out = torch.empty(q_BSHC.shape, dtype=dtype)
        with no_autocast(q_BSHC):
            for b, s, block in _gathered_blocks(inputs, rows_BSK, dtype):
                torch.bmm(_gathered_probabilities(block, scale), block.c_SKC, out=out[b, s])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHC: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, rows_BSK = ctx.saved_tensors
        dtype, wide = ctx.dtype, accumulate_dtype(inputs[0])
        grad_q, grad_q_rope = (torch.empty(x.shape, dtype=dtype) for x in inputs[:2])
        # Many queries add to one row: their sum is wider than what they add.
        grad_c, grad_k_rope = (torch.zeros(x.shape, dtype=wide) for x in inputs[2:])
        with no_autocast(grad_BSHC):
            for b, s, block in _gathered_blocks(inputs, rows_BSK, dtype):
                p_SHK = _gathered_probabilities(block, ctx.scale)
                grad = grad_BSHC[b, s].to(dtype)
                grad_q[b, s], grad_q_rope[b, s], into_c, into_k_rope = block.gradients(p_SHK, grad, ctx.scale)
                block.add_to_rows(grad_c[b], into_c)
                block.add_to_rows(grad_k_rope[b], into_k_rope)
        grads = (grad_q, grad_q_rope, grad_c, grad_k_rope)
        return (*(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)), None, None, None)


def _gathered_blocks(
    inputs: Sequence[Tensor], rows_BSK: Tensor, dtype: torch.dtype
) -> Iterator[tuple[int, slice, Block]]:
    """Sequence and queries of each block, and what these meet. `inputs`: q, q_rope, c, k_rope."""
    q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR = inputs
    B, S, H, C = q_BSHC.shape
    for b in range(B):
        for s in blocks_of_queries(S, rows_BSK.shape[2], C + H):
            tensors = (q_BSHC[b, s], q_rope_BSHR[b, s], c_BTC[b], k_rope_BTR[b], rows_BSK[b, s])
            yield b, s, Block.gathered(*tensors, dtype)


def _gathered_probabilities(block: Block, scale: float) -> Tensor:
    """[S, H, K] in the dtype of q; 0 in unused places, also where a query has no other."""
    p_SHK = torch.softmax(block.scores(scale), -1)
    return p_SHK if block.unused_SK is None else p_SHK.masked_fill_(block.unused_SK[:, None], 0.0)


def selected_attention(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, selected_BSS: Tensor, scale: float) -> Tensor:
    """See `nautile.ops.selected_attention`. Keys after a block of queries are never multiplied."""
    return _SelectedAttention.apply(q_BSHQ, k_BSHQ, v_BSHV, selected_BSS, scale, compute_dtype(q_BSHQ))


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHQ: Tensor,
        k_BSHQ: Tensor,
        v_BSHV: Tensor,
        selected_BSS: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with no_autocast(q_BSHQ):
            q, k, v = (x.to(dtype).transpose(1, 2).contiguous() for x in (q_BSHQ, k_BSHQ, v_BSHV))
            out = torch.empty_like(v)
            for b, h, s, hidden_ST in _causal_blocks(q, selected_BSS):
                t = slice(s.stop)
                p_HST = _selected_probabilities(q[b, h, s], k[b, h, t], hidden_ST, scale)
                out[b, h, s] = torch.bmm(p_HST, v[b, h, t])
        ctx.save_for_backward(q, k, v, selected_BSS)
        ctx.scale, ctx.dtypes = scale, (q_BSHQ.dtype, k_BSHQ.dtype, v_BSHV.dtype)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHV: Tensor) -> tuple[Tensor | None, ...]:
        """As of causal attention; the probabilities of each block are computed again."""
        q, k, v, selected_BSS = ctx.saved_tensors
        with no_autocast(q):
            grad = grad_BSHV.to(q.dtype).transpose(1, 2).contiguous()
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for b, h, s, hidden_ST in _causal_blocks(q, selected_BSS):
                t = slice(s.stop)
                p_HST = _selected_probabilities(q[b, h, s], k[b, h, t], hidden_ST, ctx.scale)
                grad_p = torch.bmm(grad[b, h, s], v[b, h, t].transpose(1, 2))
                flow_HST = torch.ops.aten._softmax_backward_data(grad_p, p_HST, -1, p_HST.dtype).mul_(ctx.scale)
                grad_q[b, h, s] = torch.bmm(flow_HST, k[b, h, t])
                grad_k[b, h, t].baddbmm_(flow_HST.transpose(1, 2), q[b, h, s])
                grad_v[b, h, t].baddbmm_(p_HST.transpose(1, 2), grad[b, h, s])
        grads = zip((grad_q, grad_k, grad_v), ctx.dtypes, strict=True)
        return (*(g.transpose(1, 2).to(dtype) for g, dtype in grads), None, None, None)


def _causal_blocks(q_BHSQ: Tensor, selected_BSS: Tensor) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Sequence, heads and queries s of each block, and what the latter do not see of the positions up to s.stop."""
    B, H, S, _ = q_BHSQ.shape
    for b in range(B):
        for start in range(0, S, BLOCK):
            s = slice(start, min(start + BLOCK, S))
            hidden_ST = ~selected_BSS[b, s, : s.stop].tril(start)
            heads = max(1, SCORES // hidden_ST.numel())
            for h in range(0, H, heads):
                yield b, slice(h, min(h + heads, H)), s, hidden_ST


def _selected_probabilities(q_HSQ: Tensor, k_HTQ: Tensor, hidden_ST: Tensor, scale: float) -> Tensor:
    """[H, S, T], 0 where a query does not look."""
    scores_HST = q_HSQ.new_empty(q_HSQ.shape[0], *hidden_ST.shape)
    torch.baddbmm(scores_HST, q_HSQ, k_HTQ.transpose(1, 2), beta=0.0, alpha=scale, out=scores_HST)
    return torch.softmax(scores_HST.masked_fill_(hidden_ST, float("-inf")), -1)
