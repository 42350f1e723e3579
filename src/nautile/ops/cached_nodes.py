"""Attention to the rows of a cache as nodes of a compiler's graph, which run what eager calls do; without gradients.

With a gradient to come, eager calls run the reference, and so a compiler may trace it. Dims as in `cached`.
"""

import torch
from torch import Tensor

from nautile.ops.attention_nodes import as_if
from nautile.ops.dispatch import implementation


@torch.library.custom_op("nautile::cached_attention", mutates_args=())
def cached_node(
    q_BSHQ: Tensor,
    k_BTGQ: Tensor,
    v_BTGV: Tensor,
    positions_BS: Tensor,
    scale: float,
    selected_BST: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `nautile.ops.cached_attention`."""
    with as_if(q_BSHQ, dtype):
        run = implementation("cached_attention", q_BSHQ)
        return run(q_BSHQ, k_BTGQ, v_BTGV, positions_BS, scale, selected_BST).contiguous()


@cached_node.register_fake
def _(
    q_BSHQ: Tensor,
    k_BTGQ: Tensor,
    v_BTGV: Tensor,
    positions_BS: Tensor,
    scale: float,
    selected_BST: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return q_BSHQ.new_empty(*q_BSHQ.shape[:3], v_BTGV.shape[3], dtype=dtype)


@torch.library.custom_op("nautile::latent_attention", mutates_args=())
def latent_node(
    q_BSHC: Tensor,
    q_rope_BSHR: Tensor,
    c_BTC: Tensor,
    k_rope_BTR: Tensor,
    positions_BS: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """See `nautile.ops.latent_attention`."""
    with as_if(q_BSHC, dtype):
        run = implementation("latent_attention", q_BSHC)
        return run(q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR, positions_BS, scale).contiguous()


@latent_node.register_fake
def _(
    q_BSHC: Tensor,
    q_rope_BSHR: Tensor,
    c_BTC: Tensor,
    k_rope_BTR: Tensor,
    positions_BS: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return q_BSHC.new_empty(q_BSHC.shape, dtype=dtype)
