"""Specification of `nautile.ops.index_scores` and `nautile.ops.top_rows`."""

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype, no_autocast


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def index_scores(q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor) -> Tensor:
    """All S × J × T products at once."""
    wide = accumulate_dtype(q_BSJI)
    with no_autocast(q_BSJI):
        dots_BSJT = torch.einsum("bsji,bti->bsjt", q_BSJI.to(wide), k_BTI.to(wide)).relu()
        return torch.einsum("bsj,bsjt->bst", weights_BSJ.to(wide), dots_BSJT)


def score_gradients(
    q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor, grad_BST: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and weights, written out: what autograd makes of `index_scores`."""
    wide = accumulate_dtype(q_BSJI)
    with no_autocast(q_BSJI):
        q, k, weights, grad = (x.to(wide) for x in (q_BSJI, k_BTI, weights_BSJ, grad_BST))
        dots_BSJT = torch.einsum("bsji,bti->bsjt", q, k).relu()
        flow_BSJT = (dots_BSJT > 0) * grad[:, :, None] * weights[..., None]
        grad_q, grad_k = torch.einsum("bsjt,bti->bsji", flow_BSJT, k), torch.einsum("bsjt,bsji->bti", flow_BSJT, q)
        return grad_q, grad_k, torch.einsum("bsjt,bst->bsj", dots_BSJT, grad)


def top_rows(scores_BST: Tensor, seen_BST: Tensor, k: int) -> Tensor:
    """A stable sort keeps the order of equal scores."""
    scores_BST = scores_BST.masked_fill(~seen_BST, float("-inf"))
    best = scores_BST.sort(dim=-1, descending=True, stable=True)
    return best.indices[..., :k].masked_fill(best.values[..., :k] == float("-inf"), -1)
