"""The indexer's loss over blocks of queries, with whatever computes their probabilities and scores fast.

Of a block [S, T] only a few numbers per pair exist at once, and no pair above the diagonal beyond the block. Gradients
are computed with the loss: dI = softmax(I) − p needs nothing from later on, and what was computed for a block is still
there. The backward pass multiplies them by the gradient of the loss.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.precision import accumulate_dtype, no_autocast


@dataclass(frozen=True)
class Parts:
    """What a backend brings."""

    target: Callable[[Tensor, Tensor, float, Tensor], Tensor]
    """q [S, H, Q], k [T, H, Q], scale, hidden [S, T] → head-mean probabilities [S, T], 0 where hidden.

    The queries are those of the last S of the T positions, and what comes after a query is hidden from it."""
    scores: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Index queries [1, S, J, I], keys [1, T, I], weights [1, S, J] → [1, S, T]."""
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """The same and the scores' gradient → gradients of the three, float32 or better."""
    pairs: int
    """How many pairs of a query and a position a block may have."""


def blocked_kl(
    index_q_BSJI: Tensor,
    index_k_BSI: Tensor,
    weights_BSJ: Tensor,
    q_BSHQ: Tensor,
    k_BSHQ: Tensor,
    scale: float,
    selected_BSS: Tensor | None,
    document_ids_BS: Tensor | None,
    parts: Parts,
) -> Tensor:
    """`nautile.ops.indexer_kl`, made of `parts`."""
    inputs = (index_q_BSJI, index_k_BSI, weights_BSJ)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return _BlockedKl.apply(*inputs, q_BSHQ, k_BSHQ, scale, selected_BSS, document_ids_BS, parts, wanted)


class _BlockedKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        total, grads = kl_and_gradients(*inputs)
        if grads:
            ctx.save_for_backward(*(g.to(x.dtype) for g, x in zip(grads, inputs[:3], strict=True)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        return *((grad * g).to(g.dtype) for g in ctx.saved_tensors), *(None,) * 7


def kl_and_gradients(
    index_q_BSJI: Tensor,
    index_k_BSI: Tensor,
    weights_BSJ: Tensor,
    q_BSHQ: Tensor,
    k_BSHQ: Tensor,
    scale: float,
    selected_BSS: Tensor | None,
    document_ids_BS: Tensor | None,
    parts: Parts,
    wanted: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and if they are wanted its gradients for the first three, float32 or better."""
    wide = accumulate_dtype(index_q_BSJI)
    inputs = (index_q_BSJI, index_k_BSI, weights_BSJ)
    grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in inputs] if wanted else []
    total = torch.zeros((), dtype=wide, device=q_BSHQ.device)
    with no_autocast(q_BSHQ):
        for b, s in _blocks(q_BSHQ, parts.pairs):
            hidden_ST = _hidden(b, s, q_BSHQ.device, selected_BSS, document_ids_BS)
            block = (index_q_BSJI[b, s][None], index_k_BSI[b, : s.stop][None], weights_BSJ[b, s][None])
            p_ST = parts.target(q_BSHQ[b, s], k_BSHQ[b, : s.stop], scale, hidden_ST).to(wide)
            scores_ST = parts.scores(*block)[0].masked_fill_(hidden_ST, torch.finfo(wide).min)
            log_ST = torch.log_softmax(scores_ST, -1)
            total += torch.xlogy(p_ST, p_ST).sum() - (p_ST * log_ST.masked_fill(hidden_ST, 0.0)).sum()
            if wanted:
                grad_ST = log_ST.exp_().sub_(p_ST).masked_fill_(hidden_ST, 0.0)
                into_q, into_k, into_weights = parts.gradients(*block, grad_ST[None])
                grads[0][b, s], grads[2][b, s] = into_q[0], into_weights[0]
                grads[1][b, : s.stop] += into_k[0]
    return total, grads


def _blocks(q_BSHQ: Tensor, pairs: int) -> Iterator[tuple[int, slice]]:
    """Sequence and queries of each block; a block scores the positions up to its last query."""
    B, S = q_BSHQ.shape[:2]
    step = max(1, pairs // max(S, 1))
    return ((b, slice(start, min(start + step, S))) for b in range(B) for start in range(0, S, step))


def _hidden(
    b: int, s: slice, device: torch.device, selected_BSS: Tensor | None, document_ids_BS: Tensor | None
) -> Tensor:
    """Boolean [S, T]: the positions up to the block's end that a query does not look at."""
    if selected_BSS is not None:
        return ~selected_BSS[b, s, : s.stop].tril(s.start)
    hidden_ST = torch.ones(s.stop - s.start, s.stop, dtype=torch.bool, device=device).triu(s.start + 1)
    if document_ids_BS is None:
        return hidden_ST
    ids_S = document_ids_BS[b]
    return hidden_ST | (ids_S[s, None] != ids_S[None, : s.stop])
