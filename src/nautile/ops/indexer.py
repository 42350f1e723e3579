"""The lightning indexer of DeepSeek sparse attention: what each query thinks of each row, and its best k rows.

(DeepSeek-V3.2-Exp §2.1.) B sequences, S queries, T rows, J indexer heads, I dimensions of one, K chosen rows.
"""

import torch
from torch import Tensor

from nautile.ops.dispatch import implementation
from nautile.ops.index_nodes import scores_node, top_rows_node


def index_scores(q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor) -> Tensor:
    """``I_st = Σ_j w_sj · relu(q_sj · k_t)``: one key per row for all heads (V3.2-Exp eq. 1).

    Computed in float32 or better whatever the inputs and autocast say, because a choice hangs on it. Differentiable in
    all three. No backend but the reference holds all S × J × T products at once.

    Args:
        q_BSJI: Queries of the J indexer heads.
        k_BTI: Index keys of the rows.
        weights_BSJ: Weight of each head for each query, of any sign, scale included.

    Returns:
        scores_BST, float32 (float64 for float64 queries). Nothing is masked.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    B, S, J, width = q_BSJI.shape if q_BSJI.dim() == 4 else (0, 0, 0, 0)
    if q_BSJI.dim() != 4 or k_BTI.dim() != 3 or (k_BTI.shape[0], k_BTI.shape[2]) != (B, width):
        raise ValueError(
            "index_scores: q and k must be [B, S, J, I] and [B, T, I], got "
            f"{list(q_BSJI.shape)} and {list(k_BTI.shape)}"
        )
    if weights_BSJ.shape != (B, S, J):
        raise ValueError(f"index_scores: weights must be [B, S, J] = {[B, S, J]}, got {list(weights_BSJ.shape)}")
    if not q_BSJI.dtype.is_floating_point:
        raise ValueError(f"index_scores: q must be floating point, got {q_BSJI.dtype}")
    run = scores_node if torch.compiler.is_compiling() else implementation("index_scores", q_BSJI)
    return run(q_BSJI, k_BTI, weights_BSJ)


def top_rows(scores_BST: Tensor, seen_BST: Tensor, k: int) -> Tensor:
    """The k best of the rows that each query may see; of equal scores the earlier row.

    Which of several equal rows wins must not depend on how the work was cut up, since relu makes exact zeros: the
    same sequence would otherwise be attended differently when it is read at once and when it is read token by token.

    Args:
        scores_BST: Scores; those of unseen rows may be anything, NaN included.
        seen_BST: Boolean (broadcast against the scores): True where a query may look.
        k: Rows wanted.

    Returns:
        int64 [B, S, min(k, T)]: row numbers in no particular order, −1 in the places of a query that sees fewer rows.

    Raises:
        ValueError: Shapes or dtypes do not fit together, or k < 1.
    """
    if scores_BST.dim() != 3 or not scores_BST.dtype.is_floating_point:
        raise ValueError(
            f"top_rows: scores must be floating [B, S, T], got {scores_BST.dtype} {list(scores_BST.shape)}"
        )
    pairs = zip(reversed(seen_BST.shape), reversed(scores_BST.shape), strict=False)
    if seen_BST.dtype != torch.bool or seen_BST.dim() > 3 or any(seen not in (1, size) for seen, size in pairs):
        raise ValueError(
            f"top_rows: seen must be boolean and fit scores {list(scores_BST.shape)}, "
            f"got {seen_BST.dtype} {list(seen_BST.shape)}"
        )
    if k < 1:
        raise ValueError(f"top_rows: k must be 1 or more, got {k}")
    run = top_rows_node if torch.compiler.is_compiling() else implementation("top_rows", scores_BST)
    return run(scores_BST.detach(), seen_BST, k)
