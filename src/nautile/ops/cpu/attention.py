"""Causal attention over blocks of queries: keys after a block are never multiplied.

With a backward to come, the probabilities are kept for it (S²/2 numbers per query head and row of the batch, in the
compute dtype): computing them again costs a product and an exponential more than reading them. Without one, scores
live in one small buffer that stays in the cache, a few heads at a time.

Query heads that share a key head are stacked: the J = H / G queries of a position are J rows of one product, so keys
and values are never repeated. N = B·G key heads, rows ordered by position, then by query head within the group.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.cpu.support import needs_gradient
from nautile.ops.precision import compute_dtype, no_autocast

__all__ = ["causal_attention", "why_not"]

_BUFFER = 4 << 20
"""Bytes of scores that exist at once without a backward: some of a core's share of the last-level cache."""


def causal_attention(
    q_BSHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, scale: float, document_ids_BS: Tensor | None = None
) -> Tensor:
    """See `nautile.ops.causal_attention`."""
    dtype = compute_dtype(q_BSHQ)
    if needs_gradient(q_BSHQ, k_BSGQ, v_BSGV):
        return _CausalAttention.apply(q_BSHQ, k_BSGQ, v_BSGV, scale, document_ids_BS, dtype)
    with no_autocast(q_BSHQ):
        return _attend(q_BSHQ, k_BSGQ, v_BSGV, scale, document_ids_BS, dtype)


def _attend(
    q_BSHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, scale: float, document_ids_BS: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Attention of which nothing is kept."""
    B, S, G, _ = k_BSGQ.shape
    J = q_BSHQ.shape[2] // G
    q, k, v = (_stacked(x, G, dtype) for x in (q_BSHQ, k_BSGQ, v_BSGV))
    # Turned once, not in each product: oneDNN multiplies by a bfloat16 matrix of this layout twice as fast.
    k_NQS = k.transpose(1, 2).contiguous()
    ids_NS = None if document_ids_BS is None else document_ids_BS.repeat_interleave(G, 0)
    out = v.new_empty(B * G, S * J, v.shape[-1])
    # Rows of queries in a block: more are faster products, but more of the square above the diagonal.
    size = max(1, (256 if dtype == torch.bfloat16 and S >= 1024 else 128) // J)
    room = _BUFFER // q.element_size()
    buffer = q.new_empty(min(max(room, size * J * S), B * G * S * J * S))
    for start in range(0, S, size):
        end = min(start + size, S)
        rows = slice(start * J, end * J)
        heads = max(1, room // ((end - start) * J * end))
        for n in range(0, B * G, heads):
            some = slice(n, n + heads)
            q_block, k_block = q[some, rows], k_NQS[some, :, :end]
            shape = (*q_block.shape[:2], end)
            scores = buffer[: math.prod(shape)].view(shape)
            torch.baddbmm(scores, q_block, k_block, beta=0.0, alpha=scale, out=scores)
            _hide(scores, start, end, J, None if ids_NS is None else ids_NS[some])
            out[some, rows] = torch.bmm(torch.softmax(scores, -1, out=scores), v[some, :end])
    return _unstacked(out, B, J)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHQ: Tensor,
        k_BSGQ: Tensor,
        v_BSGV: Tensor,
        scale: float,
        document_ids_BS: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        B, S, G, _ = k_BSGQ.shape
        J = q_BSHQ.shape[2] // G
        with no_autocast(q_BSHQ):
            q, k, v = (_stacked(x, G, dtype) for x in (q_BSHQ, k_BSGQ, v_BSGV))
            out = v.new_empty(B * G, S * J, v.shape[-1])
            probabilities = []
            for start, end in _blocks(S):
                rows = slice(start * J, end * J)
                scores = _scaled_bmm(q[:, rows], k[:, :end].transpose(1, 2), scale)
                _hide(scores, start, end, J, document_ids_BS)
                p = torch.softmax(scores, -1)
                probabilities.append(p)
                out[:, rows] = torch.bmm(p, v[:, :end])
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale, ctx.B, ctx.J = scale, B, J
        ctx.dtypes = q_BSHQ.dtype, k_BSGQ.dtype, v_BSGV.dtype
        return _unstacked(out, B, J)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHV: Tensor) -> tuple[Tensor | None, ...]:
        """dv = pᵀ do, ds = p ⊙ (do vᵀ − rowsum(p ⊙ do vᵀ)), dq = scale · ds k, dk = scale · dsᵀ q."""
        q, k, v, *probabilities = ctx.saved_tensors
        B, J = ctx.B, ctx.J
        with no_autocast(q):
            grad = _stacked(grad_BSHV, k.shape[0] // B, q.dtype)
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for (start, end), p in zip(_blocks(k.shape[1]), probabilities, strict=True):
                rows = slice(start * J, end * J)
                grad_out = grad[:, rows]
                grad_p = torch.bmm(grad_out, v[:, :end].transpose(1, 2))
                grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
                grad_q[:, rows] = _scaled_bmm(grad_scores, k[:, :end], ctx.scale)
                grad_k[:, :end] += _scaled_bmm(grad_scores.transpose(1, 2), q[:, rows], ctx.scale)
                grad_v[:, :end] += torch.bmm(p.transpose(1, 2), grad_out)
        grads = _unstacked(grad_q, B, J), _unstacked(grad_k, B, 1), _unstacked(grad_v, B, 1)
        return (*(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)), None, None, None)


def _blocks(S: int) -> list[tuple[int, int]]:
    # Eight blocks save 44 % of the square, the limit is 50 %; below 128 rows the products lose more than that saves.
    size = max(128, -(-S // 8))
    return [(start, min(start + size, S)) for start in range(0, S, size)]


def _stacked(x_BSHQ: Tensor, G: int, dtype: torch.dtype) -> Tensor:
    """[B·G, S·J, Q], contiguous: the J heads of a group as neighbouring rows."""
    B, S, H, Q = x_BSHQ.shape
    return x_BSHQ.to(dtype).unflatten(2, (G, H // G)).transpose(1, 2).reshape(B * G, S * (H // G), Q)


def _unstacked(x_NRQ: Tensor, B: int, J: int) -> Tensor:
    """[B, S, H, Q] of [B·G, S·J, Q]; a view if J is 1."""
    N, R, Q = x_NRQ.shape
    return x_NRQ.view(B, N // B, R // J, J, Q).transpose(1, 2).flatten(2, 3)


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b: the factor is applied while the product is written, before it is rounded."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)


def _hide(scores_NRT: Tensor, start: int, end: int, J: int, document_ids_BS: Tensor | None) -> None:
    """Set scores of later positions and of other documents to −inf, in place."""
    N, size = scores_NRT.shape[0], end - start
    scores_NSJT = scores_NRT.view(N, size, J, end)
    above = torch.full((size, size), float("-inf"), dtype=scores_NRT.dtype).triu_(1)
    scores_NSJT[..., start:] += above[:, None]
    if document_ids_BS is not None:
        other = document_ids_BS[:, start:end, None] != document_ids_BS[:, None, :end]
        B = document_ids_BS.shape[0]
        scores_NSJT.unflatten(0, (B, N // B)).masked_fill_(other[:, None, :, None], float("-inf"))
