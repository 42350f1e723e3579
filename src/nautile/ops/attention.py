"""Causal softmax attention whose values may be narrower than its keys, as in MLA."""

from torch import Tensor

from nautile.ops.dispatch import implementation


def causal_attention(
    q_BSHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, scale: float, document_ids_BS: Tensor | None = None
) -> Tensor:
    """Attention of each position to itself and earlier ones: ``o_i = Σ_{j ≤ i} softmax_j(scale · q_i·k_j) v_j``.

    Scores and softmax are rounded to no less than the compute dtype, and scores not before the scale; sums run in
    float32 or better. Differentiable in q, k and v.

    Args:
        q_BSHQ: Queries, H heads of Q dimensions.
        k_BSGQ: Keys, G heads with H a multiple of G: query head h reads key head h // (H / G) (arXiv 2305.13245).
        v_BSGV: Values of the same G heads; V may differ from Q.
        scale: Factor on the scores, usually Q**-0.5.
        document_ids_BS: Integers; a position attends only within its own document. None: one document per row.

    Returns:
        o_BSHV in the compute dtype (the autocast dtype under autocast, else the dtype of q).

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    B, S, H, Q = q_BSHQ.shape if q_BSHQ.dim() == 4 else (0, 0, 0, 0)
    G = k_BSGQ.shape[2] if k_BSGQ.dim() == 4 else 0
    if q_BSHQ.dim() != 4 or k_BSGQ.shape != (B, S, G, Q) or G == 0 or H % G:
        raise ValueError(
            "causal_attention: q and k must be [B, S, H, Q] and [B, S, G, Q] with H a multiple of G, got "
            f"{list(q_BSHQ.shape)} and {list(k_BSGQ.shape)}"
        )
    if v_BSGV.dim() != 4 or v_BSGV.shape[:3] != k_BSGQ.shape[:3]:
        raise ValueError(
            "causal_attention: v must be [B, S, G, V] with k's B, S, G; got "
            f"{list(v_BSGV.shape)} for k {list(k_BSGQ.shape)}"
        )
    if not q_BSHQ.dtype.is_floating_point:
        raise ValueError(f"causal_attention: q must be floating point, got {q_BSHQ.dtype}")
    if document_ids_BS is not None and document_ids_BS.shape != q_BSHQ.shape[:2]:
        raise ValueError(
            f"causal_attention: document_ids must be [B, S] = {list(q_BSHQ.shape[:2])}, "
            f"got {list(document_ids_BS.shape)}"
        )
    return implementation("causal_attention", q_BSHQ)(q_BSHQ, k_BSGQ, v_BSGV, scale, document_ids_BS)
