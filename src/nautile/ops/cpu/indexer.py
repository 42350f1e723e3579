"""Index scores over blocks that fit into the cache, and a selection that does not sort.

Only inputs are kept for the backward pass: the products are computed again, which costs one of its three.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.precision import accumulate_dtype, no_autocast

__all__ = ["index_scores", "score_gradients", "scores", "top_rows", "why_not"]

BLOCK_ROWS = 1024
"""Rows t of one block."""
BLOCK_PRODUCTS = 1 << 19
"""Products q_sj · k_t that exist at once: 2 MiB in float32."""


def index_scores(q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor) -> Tensor:
    """See `nautile.ops.index_scores`."""
    return _IndexScores.apply(q_BSJI, k_BTI, weights_BSJ)


class _IndexScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor) -> Tensor:
        ctx.save_for_backward(q_BSJI, k_BTI, weights_BSJ)
        return scores(q_BSJI, k_BTI, weights_BSJ)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BST: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BSJI, k_BTI, weights_BSJ = ctx.saved_tensors
        grads = score_gradients(q_BSJI, k_BTI, weights_BSJ, grad_BST)
        return grads[0].to(q_BSJI.dtype), grads[1].to(k_BTI.dtype), grads[2].to(weights_BSJ.dtype)


def scores(q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor) -> Tensor:
    """[B, S, T] in float32 or better: the forward pass alone."""
    wide = accumulate_dtype(q_BSJI)
    q, weights = q_BSJI.to(wide).contiguous(), weights_BSJ.to(wide)
    out = torch.empty(*q.shape[:2], k_BTI.shape[1], dtype=wide)
    with no_autocast(q):
        for b, s, t in _blocks(q, k_BTI):
            dots_SJT = _dots(q[b, s], k_BTI[b, t].to(wide)).relu_()
            out[b, s, t] = torch.bmm(weights[b, s, None], dots_SJT)[:, 0]
    return out


def score_gradients(
    q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor, grad_BST: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """With a_sjt = 1 where q_sj·k_t > 0 and g_sjt = dI_st w_sj a_sjt: dq = g k, dk = gᵀ q, dw = relu(q·k) dI."""
    wide = grad_BST.dtype
    q, weights = q_BSJI.to(wide).contiguous(), weights_BSJ.to(wide)
    grad_q, grad_weights = torch.zeros_like(q), torch.zeros_like(weights)
    grad_k = torch.zeros(k_BTI.shape, dtype=wide)
    with no_autocast(q):
        for b, s, t in _blocks(q, k_BTI):
            k_TI, grad_ST = k_BTI[b, t].to(wide), grad_BST[b, s, t]
            dots_SJT = _dots(q[b, s], k_TI).relu_()
            grad_weights[b, s] += torch.bmm(dots_SJT, grad_ST[..., None])[..., 0]
            active_SJT = dots_SJT.sign_()
            flow_XT = active_SJT.mul_(grad_ST[:, None]).mul_(weights[b, s, :, None]).flatten(0, 1)
            grad_q[b, s] += (flow_XT @ k_TI).view_as(grad_q[b, s])
            grad_k[b, t] += flow_XT.t() @ q[b, s].flatten(0, 1)
    return grad_q, grad_k, grad_weights


def _blocks(q_BSJI: Tensor, k_BTI: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Sequence, queries and rows of each block."""
    B, S, J, _ = q_BSJI.shape
    T = k_BTI.shape[1]
    queries = max(1, BLOCK_PRODUCTS // (J * min(T, BLOCK_ROWS) or 1))
    for b in range(B):
        for t in range(0, T, BLOCK_ROWS):
            for s in range(0, S, queries):
                yield b, slice(s, min(s + queries, S)), slice(t, min(t + BLOCK_ROWS, T))


def _dots(q_SJI: Tensor, k_TI: Tensor) -> Tensor:
    """[S, J, T]: one matrix product."""
    return (q_SJI.flatten(0, 1) @ k_TI.t()).unflatten(0, q_SJI.shape[:2])


def top_rows(scores_BST: Tensor, seen_BST: Tensor, k: int) -> Tensor:
    """See `nautile.ops.top_rows`. A partial selection, then the few queries whose cut runs through equal scores."""
    scores_BST = scores_BST.masked_fill(~seen_BST, float("-inf"))
    if scores_BST.shape[-1] == 0:
        return scores_BST.long()
    best = scores_BST.topk(min(k, scores_BST.shape[-1]), dim=-1, sorted=False)
    worst_BS1 = best.values.amin(-1, keepdim=True)
    reach_BS = (scores_BST >= worst_BS1).sum(-1)
    tied_BS = (reach_BS > best.values.shape[-1]) & (worst_BS1[..., 0] > float("-inf"))
    rows_BSK = best.indices.masked_fill_(best.values == float("-inf"), -1)
    if tied_BS.any():
        ordered = scores_BST[tied_BS].sort(dim=-1, descending=True, stable=True).indices
        rows_BSK[tied_BS] = ordered[:, : rows_BSK.shape[-1]]
    return rows_BSK
