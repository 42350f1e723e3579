"""The indexer's loss over blocks that fit into the cache, a few heads of the main attention at a time."""

import torch
from torch import Tensor

from nautile.ops.blocked_kl import Parts, blocked_kl
from nautile.ops.cpu.indexer import score_gradients, scores
from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.precision import accumulate_dtype

__all__ = ["indexer_kl", "parts", "why_not"]

PAIRS = 1 << 17
"""Pairs of a query and a position in one block: 512 KiB of each of its matrices in float32."""
PROBABILITIES = 1 << 19
"""Probabilities of some heads of a block that exist at once: 2 MiB in float32."""


def indexer_kl(
    index_q_BSJI: Tensor,
    index_k_BSI: Tensor,
    weights_BSJ: Tensor,
    q_BSHQ: Tensor,
    k_BSHQ: Tensor,
    scale: float,
    selected_BSS: Tensor | None,
    document_ids_BS: Tensor | None,
) -> Tensor:
    """See `nautile.ops.indexer_kl`."""
    inputs = (index_q_BSJI, index_k_BSI, weights_BSJ, q_BSHQ, k_BSHQ, scale, selected_BSS, document_ids_BS)
    return blocked_kl(*inputs, parts())


def parts() -> Parts:
    """What this backend brings to the blocks."""
    return Parts(attention_target, scores, score_gradients, PAIRS)


def attention_target(q_SHQ: Tensor, k_THQ: Tensor, scale: float, hidden_ST: Tensor) -> Tensor:
    """Head-mean probabilities in float32 or better; the products in the dtype of q."""
    (S, H, _), T = q_SHQ.shape, k_THQ.shape[0]
    q_HSQ, k_HQT = q_SHQ.transpose(0, 1), k_THQ.permute(1, 2, 0)
    sum_ST = torch.zeros(S, T, dtype=accumulate_dtype(q_SHQ))
    step = max(1, PROBABILITIES // max(1, S * T))
    for h in range(0, H, step):
        scores_HST = torch.bmm(q_HSQ[h : h + step], k_HQT[h : h + step]).to(sum_ST.dtype).mul_(scale)
        # The lowest number instead of −inf: a query that sees nothing stays finite.
        scores_HST.masked_fill_(hidden_ST, torch.finfo(sum_ST.dtype).min)
        sum_ST += torch.softmax(scores_HST, -1).sum(0)
    return sum_ST.div_(H).masked_fill_(hidden_ST, 0.0)
