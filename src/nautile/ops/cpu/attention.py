"""Causal attention over blocks of queries: keys after a block are never multiplied.

The probabilities are kept for the backward pass (S²/2 numbers per head and row of the batch, in the compute dtype):
computing them again costs a product and an exponential more than reading them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.precision import compute_dtype, no_autocast

__all__ = ["causal_attention", "why_not"]


def causal_attention(
    q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, scale: float, document_ids_BS: Tensor | None = None
) -> Tensor:
    """See `nautile.ops.causal_attention`."""
    return _CausalAttention.apply(q_BSHQ, k_BSHQ, v_BSHV, scale, document_ids_BS, compute_dtype(q_BSHQ))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHQ: Tensor,
        k_BSHQ: Tensor,
        v_BSHV: Tensor,
        scale: float,
        document_ids_BS: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        B, S, H, _ = q_BSHQ.shape
        with no_autocast(q_BSHQ):
            q, k, v = (_heads_first(x, dtype) for x in (q_BSHQ, k_BSHQ, v_BSHV))
            out = torch.empty_like(v)
            probabilities = []
            for start, end in _blocks(S):
                scores = _scaled_bmm(q[:, start:end], k[:, :end].transpose(1, 2), scale)
                _hide(scores, start, end, document_ids_BS, H)
                p = torch.softmax(scores, -1)
                probabilities.append(p)
                out[:, start:end] = torch.bmm(p, v[:, :end])
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale, ctx.B = scale, B
        ctx.dtypes = q_BSHQ.dtype, k_BSHQ.dtype, v_BSHV.dtype
        return _heads_last(out, B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHV: Tensor) -> tuple[Tensor | None, ...]:
        """dv = pᵀ do, ds = p ⊙ (do vᵀ − rowsum(p ⊙ do vᵀ)), dq = scale · ds k, dk = scale · dsᵀ q."""
        q, k, v, *probabilities = ctx.saved_tensors
        with no_autocast(q):
            grad = _heads_first(grad_BSHV, q.dtype)
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for (start, end), p in zip(_blocks(q.shape[1]), probabilities, strict=True):
                grad_out = grad[:, start:end]
                grad_p = torch.bmm(grad_out, v[:, :end].transpose(1, 2))
                grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
                grad_q[:, start:end] = _scaled_bmm(grad_scores, k[:, :end], ctx.scale)
                grad_k[:, :end] += _scaled_bmm(grad_scores.transpose(1, 2), q[:, start:end], ctx.scale)
                grad_v[:, :end] += torch.bmm(p.transpose(1, 2), grad_out)
        grads = (_heads_last(g, ctx.B).to(dtype) for g, dtype in zip((grad_q, grad_k, grad_v), ctx.dtypes, strict=True))
        return (*grads, None, None, None)


def _blocks(S: int) -> list[tuple[int, int]]:
    # Eight blocks save 44 % of the square, the limit is 50 %; below 128 rows the products lose more than that saves.
    size = max(128, -(-S // 8))
    return [(start, min(start + size, S)) for start in range(0, S, size)]


def _heads_first(x_BSHQ: Tensor, dtype: torch.dtype) -> Tensor:
    """[B·H, S, Q], contiguous."""
    B, S, H, Q = x_BSHQ.shape
    return x_BSHQ.to(dtype).transpose(1, 2).reshape(B * H, S, Q)


def _heads_last(x_NSQ: Tensor, B: int) -> Tensor:
    """[B, S, H, Q] as a view of [B·H, S, Q]."""
    return x_NSQ.unflatten(0, (B, -1)).transpose(1, 2)


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b: the factor is applied while the product is written, before it is rounded."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)


def _hide(scores_NST: Tensor, start: int, end: int, document_ids_BS: Tensor | None, H: int) -> None:
    """Set scores of later positions and of other documents to −inf, in place."""
    size = end - start
    above = torch.full((size, size), float("-inf"), dtype=scores_NST.dtype).triu_(1)
    scores_NST[:, :, start:] += above
    if document_ids_BS is not None:
        other = document_ids_BS[:, start:end, None] != document_ids_BS[:, None, :end]
        scores_NST.unflatten(0, (-1, H)).masked_fill_(other.unsqueeze(1), float("-inf"))
