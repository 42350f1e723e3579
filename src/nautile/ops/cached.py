"""Attention of new tokens to the rows of a cache: keys and values of heads, or the latents that stand for them.

B sequences, S queries, T rows, H query heads, G key heads, Q key, V value, C latent, R rope. Row index = position.
"""

import torch
from torch import Tensor

from nautile.ops.cached_nodes import cached_node, latent_node
from nautile.ops.cpu.support import needs_gradient
from nautile.ops.dispatch import implementation
from nautile.ops.precision import compute_dtype


def cached_attention(
    q_BSHQ: Tensor,
    k_BTGQ: Tensor,
    v_BTGV: Tensor,
    positions_BS: Tensor,
    scale: float,
    selected_BST: Tensor | None = None,
) -> Tensor:
    """Attention of queries to the rows up to their own positions: ``o_i = Σ_{t ≤ p_i} softmax_t(scale · q_i·k_t) v_t``.

    Sequences may stand at different positions. Rows past the last position of a sequence are not read: they may hold
    anything. Scores and softmax are rounded to no less than the compute dtype, and scores not before the scale; sums
    run in float32 or better. Differentiable in q, k and v.

    Args:
        q_BSHQ: Queries, H heads of Q dimensions.
        k_BTGQ: Keys, G heads with H a multiple of G, shared as in `causal_attention`.
        v_BTGV: Values of the same G heads; V may differ from Q.
        positions_BS: int64 below T.
        scale: Factor on the scores, usually Q**-0.5.
        selected_BST: Boolean: True where a query reads a row, at least one up to its position; what it says about
            later rows is not looked at. None: it reads all of them.

    Returns:
        o_BSHV in the compute dtype (the autocast dtype under autocast, else the dtype of q).

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    B, S, H, Q = q_BSHQ.shape if q_BSHQ.dim() == 4 else (0, 0, 0, 0)
    T, G = k_BTGQ.shape[1:3] if k_BTGQ.dim() == 4 else (0, 0)
    if q_BSHQ.dim() != 4 or k_BTGQ.shape != (B, T, G, Q) or G == 0 or H % G:
        raise ValueError(
            "cached_attention: q and k must be [B, S, H, Q] and [B, T, G, Q] with H a multiple of G, got "
            f"{list(q_BSHQ.shape)} and {list(k_BTGQ.shape)}"
        )
    if v_BTGV.dim() != 4 or v_BTGV.shape[:3] != k_BTGQ.shape[:3]:
        raise ValueError(
            "cached_attention: v must be [B, T, G, V] with k's B, T, G; got "
            f"{list(v_BTGV.shape)} for k {list(k_BTGQ.shape)}"
        )
    _check_queries("cached_attention", q_BSHQ, positions_BS)
    if selected_BST is not None and (selected_BST.shape != (B, S, T) or selected_BST.dtype != torch.bool):
        raise ValueError(
            f"cached_attention: selected must be boolean [B, S, T] = {[B, S, T]}, "
            f"got {selected_BST.dtype} {list(selected_BST.shape)}"
        )
    if torch.compiler.is_compiling() and not needs_gradient(q_BSHQ, k_BTGQ, v_BTGV):
        return cached_node(q_BSHQ, k_BTGQ, v_BTGV, positions_BS, scale, selected_BST, compute_dtype(q_BSHQ))
    run = implementation("cached_attention", q_BSHQ)
    return run(q_BSHQ, k_BTGQ, v_BTGV, positions_BS, scale, selected_BST)


def latent_attention(
    q_BSHC: Tensor, q_rope_BSHR: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, positions_BS: Tensor, scale: float
) -> Tensor:
    """MLA's absorbed attention to the rows up to each query's position (DeepSeek-V2 §2.1.2).

    ``p_iht = softmax_t(scale · (q_ih·c_t + q_rope_ih·k_rope_t)),  o_ih = Σ_{t ≤ p_i} p_iht c_t``: `gathered_attention`
    without a choice. Rows past the last position of a sequence are not read: they may hold anything. Scores and
    softmax are rounded to no less than the compute dtype; sums run in float32 or better. Differentiable in all but
    the positions.

    Args:
        q_BSHC: Queries with W_UK folded in.
        q_rope_BSHR: Rotated part of the queries.
        c_BTC: Latents: keys and values at once.
        k_rope_BTR: Rotated keys, shared by all heads.
        positions_BS: int64 below T.
        scale: Factor on the scores.

    Returns:
        o_BSHC in the compute dtype.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    check_latents("latent_attention", q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR)
    _check_queries("latent_attention", q_BSHC, positions_BS)
    inputs = (q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR)
    if torch.compiler.is_compiling() and not needs_gradient(*inputs):
        return latent_node(*inputs, positions_BS, scale, compute_dtype(q_BSHC))
    run = implementation("latent_attention", q_BSHC)
    return run(*inputs, positions_BS, scale)


def check_latents(op: str, q_BSHC: Tensor, q_rope_BSHR: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor) -> None:
    """Raise `ValueError`, in the name of `op`, if absorbed queries and latents do not fit together."""
    B, S, H, C = q_BSHC.shape if q_BSHC.dim() == 4 else (0, 0, 0, 0)
    T, R = k_rope_BTR.shape[1:] if k_rope_BTR.dim() == 3 else (0, 0)
    if q_BSHC.dim() != 4 or c_BTC.shape != (B, T, C):
        raise ValueError(
            f"{op}: q and c must be [B, S, H, C] and [B, T, C], got "
            f"{list(q_BSHC.shape)} and {list(c_BTC.shape)} for k_rope {list(k_rope_BTR.shape)}"
        )
    if q_rope_BSHR.shape != (B, S, H, R) or k_rope_BTR.shape != (B, T, R):
        raise ValueError(
            f"{op}: q_rope and k_rope must be [B, S, H, R] and [B, T, R], got "
            f"{list(q_rope_BSHR.shape)} and {list(k_rope_BTR.shape)}"
        )


def _check_queries(op: str, q_BSHQ: Tensor, positions_BS: Tensor) -> None:
    if not q_BSHQ.dtype.is_floating_point:
        raise ValueError(f"{op}: q must be floating point, got {q_BSHQ.dtype}")
    if positions_BS.shape != q_BSHQ.shape[:2] or positions_BS.dtype != torch.int64:
        raise ValueError(
            f"{op}: positions must be int64 [B, S] = {list(q_BSHQ.shape[:2])}, "
            f"got {positions_BS.dtype} {list(positions_BS.shape)}"
        )
