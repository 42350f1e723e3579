"""Causal softmax attention whose values may be narrower than its keys, as in MLA."""

from torch import Tensor

from nautile.ops.dispatch import implementation


def causal_attention(
    q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, scale: float, document_ids_BS: Tensor | None = None
) -> Tensor:
    """Attention of each position to itself and earlier ones: ``o_i = Σ_{j ≤ i} softmax_j(scale · q_i·k_j) v_j``.

    Scores and softmax are rounded to no less than the compute dtype; sums run in float32 or better. Differentiable in
    q, k and v.

    Args:
        q_BSHQ: Queries, H heads of Q dimensions.
        k_BSHQ: Keys, of the same shape as the queries.
        v_BSHV: Values; V may differ from Q.
        scale: Factor on the scores, usually Q**-0.5.
        document_ids_BS: Integers; a position attends only within its own document. None: one document per row.

    Returns:
        o_BSHV in the compute dtype (the autocast dtype under autocast, else the dtype of q).

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    if q_BSHQ.dim() != 4 or k_BSHQ.shape != q_BSHQ.shape:
        raise ValueError(
            "causal_attention: q and k must share one shape [B, S, H, Q], got "
            f"{list(q_BSHQ.shape)} and {list(k_BSHQ.shape)}"
        )
    if v_BSHV.dim() != 4 or v_BSHV.shape[:3] != q_BSHQ.shape[:3]:
        raise ValueError(
            "causal_attention: v must be [B, S, H, V] with q's B, S, H; got "
            f"{list(v_BSHV.shape)} for q {list(q_BSHQ.shape)}"
        )
    if not q_BSHQ.dtype.is_floating_point:
        raise ValueError(f"causal_attention: q must be floating point, got {q_BSHQ.dtype}")
    if document_ids_BS is not None and document_ids_BS.shape != q_BSHQ.shape[:2]:
        raise ValueError(
            f"causal_attention: document_ids must be [B, S] = {list(q_BSHQ.shape[:2])}, "
            f"got {list(document_ids_BS.shape)}"
        )
    return implementation("causal_attention", q_BSHQ)(q_BSHQ, k_BSHQ, v_BSHV, scale, document_ids_BS)
