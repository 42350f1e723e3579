"""Sparse attention over blocks of queries. Only inputs are kept for the backward pass, which computes the
probabilities again: memory stays at one block's.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.precision import accumulate_dtype, compute_dtype, no_autocast

__all__ = ["gathered_attention", "selected_attention", "why_not"]

GATHERED_NUMBERS = 1 << 22
"""Numbers of gathered latents and scores that exist at once: 16 MiB in float32."""
BLOCK = 64
"""Queries of one block of `selected_attention`."""
SCORES = 1 << 20
"""Scores of one block of it that exist at once, a few heads': 4 MiB in float32."""


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
        ctx.save_for_backward(q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR, rows_BSK)
        ctx.scale, ctx.dtype = scale, dtype
        out = torch.empty(q_BSHC.shape, dtype=dtype)
        with no_autocast(q_BSHC):
            for b, s in _queries(q_BSHC, rows_BSK):
                q, q_rope = q_BSHC[b, s].to(dtype), q_rope_BSHR[b, s].to(dtype)
                c, k_rope, unused = _gather(c_BTC[b], k_rope_BTR[b], rows_BSK[b, s], dtype)
                p_SHK = _probabilities(q, q_rope, c, k_rope, unused, scale)
                torch.bmm(p_SHK, c, out=out[b, s])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHC: Tensor) -> tuple[Tensor | None, ...]:
        """ds = p ⊙ (do cᵀ − rowsum(p ⊙ do cᵀ)); a latent is key and value, so dc = scale · dsᵀ q + pᵀ do."""
        q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR, rows_BSK = ctx.saved_tensors
        dtype, wide = ctx.dtype, accumulate_dtype(q_BSHC)
        grad_q, grad_q_rope = torch.empty(q_BSHC.shape, dtype=dtype), torch.empty(q_rope_BSHR.shape, dtype=dtype)
        # Many queries add to one row: their sum is wider than what they add.
        grad_c, grad_k_rope = torch.zeros(c_BTC.shape, dtype=wide), torch.zeros(k_rope_BTR.shape, dtype=wide)
        with no_autocast(q_BSHC):
            for b, s in _queries(q_BSHC, rows_BSK):
                q, q_rope, grad = (x[b, s].to(dtype) for x in (q_BSHC, q_rope_BSHR, grad_BSHC))
                c, k_rope, unused = _gather(c_BTC[b], k_rope_BTR[b], rows_BSK[b, s], dtype)
                p_SHK = _probabilities(q, q_rope, c, k_rope, unused, ctx.scale)
                grad_p = torch.bmm(grad, c.transpose(1, 2))
                flow_SHK = torch.ops.aten._softmax_backward_data(grad_p, p_SHK, -1, p_SHK.dtype).mul_(ctx.scale)
                torch.bmm(flow_SHK, c, out=grad_q[b, s])
                torch.bmm(flow_SHK, k_rope, out=grad_q_rope[b, s])
                into_c = torch.bmm(flow_SHK.transpose(1, 2), q).baddbmm_(p_SHK.transpose(1, 2), grad)
                into_k_rope = torch.bmm(flow_SHK.transpose(1, 2), q_rope)
                rows_X = rows_BSK[b, s].clamp(min=0).flatten()  # unused places add zeros to row 0
                grad_c[b].index_add_(0, rows_X, into_c.flatten(0, 1).to(wide))
                grad_k_rope[b].index_add_(0, rows_X, into_k_rope.flatten(0, 1).to(wide))
        inputs = (q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR)
        grads = (grad_q, grad_q_rope, grad_c, grad_k_rope)
        return (*(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)), None, None, None)


def _queries(q_BSHC: Tensor, rows_BSK: Tensor) -> Iterator[tuple[int, slice]]:
    """Sequence and queries of each block."""
    B, S, H, C = q_BSHC.shape
    size = max(1, GATHERED_NUMBERS // (rows_BSK.shape[2] * (C + H) or 1))
    return ((b, slice(s, min(s + size, S))) for b in range(B) for s in range(0, S, size))


def _gather(
    c_TC: Tensor, k_rope_TR: Tensor, rows_SK: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents [S, K, C], rotated keys [S, K, R], and which places are unused, or None if all are used."""
    unused_SK = rows_SK < 0
    if not unused_SK.any():
        flat = rows_SK.flatten()
        c, k_rope = (x.index_select(0, flat).unflatten(0, rows_SK.shape).to(dtype) for x in (c_TC, k_rope_TR))
        return c, k_rope, None
    flat = rows_SK.clamp(min=0).flatten()
    c, k_rope = (x.index_select(0, flat).unflatten(0, rows_SK.shape).to(dtype) for x in (c_TC, k_rope_TR))
    # 0 · NaN is NaN: what stands in an unused place must be a number.
    return c.masked_fill_(unused_SK[..., None], 0.0), k_rope.masked_fill_(unused_SK[..., None], 0.0), unused_SK


def _probabilities(
    q_SHC: Tensor, q_rope_SHR: Tensor, c_SKC: Tensor, k_rope_SKR: Tensor, unused_SK: Tensor | None, scale: float
) -> Tensor:
    """[S, H, K] in the dtype of q; 0 in unused places, also where a query has no other."""
    scores_SHK = torch.bmm(q_SHC, c_SKC.transpose(1, 2))
    scores_SHK = torch.baddbmm(scores_SHK, q_rope_SHR, k_rope_SKR.transpose(1, 2), beta=scale, alpha=scale)
    if unused_SK is None:
        return torch.softmax(scores_SHK, -1)
    scores_SHK.masked_fill_(unused_SK[:, None], float("-inf"))
    return torch.softmax(scores_SHK, -1).masked_fill_(unused_SK[:, None], 0.0)


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
