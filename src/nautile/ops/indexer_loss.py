"""What trains an indexer: its scores are to be distributed as the main attention is (DeepSeek-V3.2-Exp §2.1.1).

B sequences, S positions, J indexer heads, I dimensions of one, H heads of the main attention, Q dimensions of one.
"""

import torch
from torch import Tensor

from nautile.ops.dispatch import implementation
from nautile.ops.index_nodes import kl_node


def indexer_kl(
    index_q_BSJI: Tensor,
    index_k_BSI: Tensor,
    weights_BSJ: Tensor,
    q_BSHQ: Tensor,
    k_BSHQ: Tensor,
    scale: float,
    selected_BSS: Tensor | None = None,
    document_ids_BS: Tensor | None = None,
) -> Tensor:
    """Σ_s KL(p_s ‖ softmax(I_s)): how far the indexer is from the attention beside it.

    ``p_st = (1/H) Σ_h softmax_t(scale · q_sh · k_th)`` and ``I_st = Σ_j w_sj · relu(index_q_sj · index_k_t)``, both
    over the same positions t: with `selected_BSS` the selected ones (the sparse stage, where the main attention reads
    no others), otherwise all of s's document up to s (the dense warm-up). The head-mean is the head-sum after
    L1-normalisation. A position that sees nothing costs nothing.

    Differentiable in index_q, index_k and weights; q and k are the target and get no gradient. No backend but the
    reference holds S × S × H or S × S × J numbers at once. Computed in float32 or better; the target's products in the
    dtype of q, as the attention's own.

    Args:
        index_q_BSJI: Queries of the J indexer heads.
        index_k_BSI: Index keys.
        weights_BSJ: Weight of each indexer head, scale included.
        q_BSHQ: Queries of the main attention.
        k_BSHQ: Its keys.
        scale: Factor on its scores.
        selected_BSS: Boolean: True where query i (second to last) reads position j (last); what it says about j > i is
            not looked at.
        document_ids_BS: int64, equal for tokens of one document. Not together with `selected_BSS`.

    Returns:
        Scalar in nats, summed over all positions; float32 (float64 for float64 queries of the indexer).

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    B, S, J, width = index_q_BSJI.shape if index_q_BSJI.dim() == 4 else (0, 0, 0, 0)
    if index_q_BSJI.dim() != 4 or index_k_BSI.shape != (B, S, width):
        raise ValueError(
            "indexer_kl: index_q and index_k must be [B, S, J, I] and [B, S, I], got "
            f"{list(index_q_BSJI.shape)} and {list(index_k_BSI.shape)}"
        )
    if weights_BSJ.shape != (B, S, J):
        raise ValueError(f"indexer_kl: weights must be [B, S, J] = {[B, S, J]}, got {list(weights_BSJ.shape)}")
    if q_BSHQ.dim() != 4 or q_BSHQ.shape[:2] != (B, S) or k_BSHQ.shape != q_BSHQ.shape:
        raise ValueError(
            f"indexer_kl: q and k must both be [B, S, H, Q] with B, S = {B}, {S}; got {list(q_BSHQ.shape)} and "
            f"{list(k_BSHQ.shape)}"
        )
    for name, x in (("index_q", index_q_BSJI), ("q", q_BSHQ)):
        if not x.dtype.is_floating_point:
            raise ValueError(f"indexer_kl: {name} must be floating point, got {x.dtype}")
    if selected_BSS is not None and (selected_BSS.shape != (B, S, S) or selected_BSS.dtype != torch.bool):
        raise ValueError(
            f"indexer_kl: selected must be boolean [B, S, S] = {[B, S, S]}, "
            f"got {selected_BSS.dtype} {list(selected_BSS.shape)}"
        )
    if document_ids_BS is not None and document_ids_BS.shape != (B, S):
        raise ValueError(f"indexer_kl: document ids must be [B, S] = {[B, S]}, got {list(document_ids_BS.shape)}")
    if selected_BSS is not None and document_ids_BS is not None:
        raise ValueError("indexer_kl: selected and document ids exclude each other: a selection stays in its document")
    inputs = (index_q_BSJI, index_k_BSI, weights_BSJ, q_BSHQ.detach(), k_BSHQ.detach(), scale)
    if torch.compiler.is_compiling():
        return kl_node(*inputs, selected_BSS, document_ids_BS)[0]
    return implementation("indexer_kl", index_q_BSJI)(*inputs, selected_BSS, document_ids_BS)
