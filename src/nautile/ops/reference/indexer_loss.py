"""Specification of `nautile.ops.indexer_kl`."""

import torch
from torch import Tensor

from nautile.ops.blocked_kl import Parts
from nautile.ops.precision import accumulate_dtype, no_autocast
from nautile.ops.reference.indexer import index_scores, score_gradients


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


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
    """Everything at once, masked."""
    hidden_BSS = ~visible(q_BSHQ, selected_BSS, document_ids_BS)
    p_BSS = attention_target(q_BSHQ, k_BSHQ, scale, hidden_BSS, accumulate_dtype(index_q_BSJI))
    scores_BSS = index_scores(index_q_BSJI, index_k_BSI, weights_BSJ)
    # The lowest number instead of −inf: a position that sees nothing gets finite logarithms, which weigh nothing.
    log_BSS = scores_BSS.masked_fill(hidden_BSS, torch.finfo(scores_BSS.dtype).min).log_softmax(-1)
    return (torch.xlogy(p_BSS, p_BSS) - p_BSS * log_BSS.masked_fill(hidden_BSS, 0.0)).sum()


def visible(q_BSHQ: Tensor, selected_BSS: Tensor | None, document_ids_BS: Tensor | None) -> Tensor:
    """Boolean [B, S, S]: what both distributions are over."""
    B, S = q_BSHQ.shape[:2]
    visible_BSS = torch.ones(S, S, dtype=torch.bool, device=q_BSHQ.device).tril().expand(B, S, S)
    if selected_BSS is not None:
        visible_BSS = visible_BSS & selected_BSS
    if document_ids_BS is not None:
        visible_BSS = visible_BSS & (document_ids_BS[:, :, None] == document_ids_BS[:, None, :])
    return visible_BSS


def attention_target(q_BSHQ: Tensor, k_BTHQ: Tensor, scale: float, hidden_BST: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean over heads of the attention's probabilities, 0 where hidden."""
    wide = torch.promote_types(accumulate_dtype(q_BSHQ), dtype)
    with no_autocast(q_BSHQ):
        scores_BHST = torch.einsum("bshq,bthq->bhst", q_BSHQ.to(wide), k_BTHQ.to(wide)) * scale
        scores_BHST = scores_BHST.masked_fill(hidden_BST[:, None], torch.finfo(wide).min)
        return scores_BHST.softmax(-1).mean(1).masked_fill(hidden_BST, 0.0).to(dtype)


def parts() -> Parts:
    """The same in blocks of one sequence, for a compiler's graph, which wants gradients beside the loss."""

    def target(q_SHQ: Tensor, k_THQ: Tensor, scale: float, hidden_ST: Tensor) -> Tensor:
        return attention_target(q_SHQ[None], k_THQ[None], scale, hidden_ST[None], accumulate_dtype(q_SHQ))[0]

    return Parts(target, index_scores, score_gradients, pairs=1 << 22)
