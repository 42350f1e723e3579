"""Attention of each query to rows that were chosen for it: gathered from latents, or as a mask over whole sequences.

(DeepSeek-V3.2-Exp §2.1.) B sequences, S queries, T rows, K chosen rows, H heads, C latent, R rope, Q key, V value.
"""

import torch
from torch import Tensor

from nautile.ops.attention_nodes import gathered_node, selected_node
from nautile.ops.cached import check_latents
from nautile.ops.dispatch import implementation
from nautile.ops.precision import compute_dtype


def gathered_attention(
    q_BSHC: Tensor, q_rope_BSHR: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, rows_BSK: Tensor, scale: float
) -> Tensor:
    """MLA's absorbed attention over the rows that each query names; work and memory follow K, not T.

    ``p_shk = softmax_k(scale · (q_sh·c_r + q_rope_sh·k_rope_r)),  o_sh = Σ_k p_shk c_r`` with r = rows[s, k]. All heads
    share the rows, so a gathered row serves H queries. A query without any row gives 0. Rows that nobody names are not
    read: they may hold anything. Scores and softmax are rounded to no less than the compute dtype; sums run in float32
    or better. Differentiable in all but `rows_BSK`; on a GPU what queries give to a row's gradient is added in any
    order, unless ``torch.use_deterministic_algorithms(True)`` asks for the same one each time.

    Args:
        q_BSHC: Queries with W_UK folded in.
        q_rope_BSHR: Rotated part of the queries.
        c_BTC: Latents: keys and values at once.
        k_rope_BTR: Rotated keys, shared by all heads.
        rows_BSK: int64 row numbers below T, each at most once per query; −1 marks an unused place.
        scale: Factor on the scores.

    Returns:
        o_BSHC in the compute dtype (the autocast dtype under autocast, else the dtype of q).

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    check_latents("gathered_attention", q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR)
    if rows_BSK.dim() != 3 or rows_BSK.shape[:2] != q_BSHC.shape[:2] or rows_BSK.dtype != torch.int64:
        raise ValueError(
            f"gathered_attention: rows must be int64 [B, S, K], got {rows_BSK.dtype} {list(rows_BSK.shape)} "
            f"for q {list(q_BSHC.shape)}"
        )
    if not q_BSHC.dtype.is_floating_point:
        raise ValueError(f"gathered_attention: q must be floating point, got {q_BSHC.dtype}")
    if torch.compiler.is_compiling():
        return gathered_node(q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR, rows_BSK, scale, compute_dtype(q_BSHC))
    run = implementation("gathered_attention", q_BSHC)
    return run(q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR, rows_BSK, scale)


def selected_attention(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, selected_BSS: Tensor, scale: float) -> Tensor:
    """Causal attention of whole sequences to the positions that each one selected.

    ``o_i = Σ_{j ∈ selected_i} softmax_j(scale · q_i·k_j) v_j``: the form for training and for reading a prompt, where
    keys and values of every position exist anyway. Scores and softmax are rounded to no less than the compute dtype;
    sums run in float32 or better. Differentiable in q, k and v.

    Args:
        q_BSHQ: Queries.
        k_BSHQ: Keys.
        v_BSHV: Values; V may differ from Q.
        selected_BSS: Boolean: True where query i (second to last) reads position j (last). Each i selects at least one
            j; what it says about j > i is not looked at.
        scale: Factor on the scores.

    Returns:
        o_BSHV in the compute dtype.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    B, S = q_BSHQ.shape[:2]
    if q_BSHQ.dim() != 4 or k_BSHQ.shape != q_BSHQ.shape:
        raise ValueError(
            f"selected_attention: q and k must both be [B, S, H, Q], got {list(q_BSHQ.shape)} and {list(k_BSHQ.shape)}"
        )
    if v_BSHV.dim() != 4 or v_BSHV.shape[:3] != q_BSHQ.shape[:3]:
        raise ValueError(
            "selected_attention: v must be [B, S, H, V] with q's B, S, H; got "
            f"{list(v_BSHV.shape)} for q {list(q_BSHQ.shape)}"
        )
    if selected_BSS.shape != (B, S, S) or selected_BSS.dtype != torch.bool:
        raise ValueError(
            f"selected_attention: selected must be boolean [B, S, S] = {[B, S, S]}, "
            f"got {selected_BSS.dtype} {list(selected_BSS.shape)}"
        )
    if not q_BSHQ.dtype.is_floating_point:
        raise ValueError(f"selected_attention: q must be floating point, got {q_BSHQ.dtype}")
    if torch.compiler.is_compiling():
        return selected_node(q_BSHQ, k_BSHQ, v_BSHV, selected_BSS, scale, compute_dtype(q_BSHQ))
    return implementation("selected_attention", q_BSHQ)(q_BSHQ, k_BSHQ, v_BSHV, selected_BSS, scale)
