"""Parts of a block as several families wire them: from the fields of a configuration to layers.

A family's `model.py` says which of them stand in which layer.
"""

from functools import partial
from typing import overload

from nautile.layers.attention.gqa import GroupedQueryAttention
from nautile.layers.attention.indexer import Indexer
from nautile.layers.attention.mla import MLA
from nautile.layers.attention.sparse_mla import SparseMLA
from nautile.layers.ffn import SwiGLU
from nautile.layers.moe.experts import Experts
from nautile.layers.moe.layer import MoE
from nautile.layers.moe.router import Router
from nautile.layers.rope import Rope
from nautile.models.config import DecoderConfig, GroupedHeads, LatentHeads, RoutedExperts


def dense(c: DecoderConfig) -> SwiGLU:
    """The feed-forward of a layer without experts."""
    return SwiGLU(c.hidden_size, c.intermediate_size)


def mixture(c: RoutedExperts, local: range | None = None) -> MoE:
    """Router, routed experts and the fused shared expert of one layer.

    Args:
        c: The fields of the mixture.
        local: The experts that this process holds; None for all. The router knows all of them always.
    """
    router = Router(
        c.hidden_size,
        c.n_routed_experts,
        c.num_experts_per_tok,
        scoring_func=c.scoring_func,
        method=c.topk_method,
        n_group=c.n_group,
        topk_group=c.topk_group,
        normalise=c.norm_topk_prob,
        scaling_factor=c.routed_scaling_factor,
        sequence_balance=c.seq_aux,
    )
    held = c.n_routed_experts if local is None else len(local)
    shared_width = c.n_shared_experts * c.moe_intermediate_size
    return MoE(
        router,
        Experts(held, c.hidden_size, c.moe_intermediate_size),
        SwiGLU(c.hidden_size, shared_width) if shared_width else None,
    )


@overload
def latent_attention(c: LatentHeads, layer: int) -> MLA: ...


@overload
def latent_attention(c: LatentHeads, layer: int, indexer: Indexer) -> SparseMLA: ...


def latent_attention(c: LatentHeads, layer: int, indexer: Indexer | None = None) -> MLA:
    """Multi-head latent attention of the layer with this index, sparse behind an indexer."""
    kind = MLA if indexer is None else partial(SparseMLA, indexer=indexer)
    return kind(
        layer,
        c.hidden_size,
        c.num_attention_heads,
        q_lora_rank=c.q_lora_rank,
        kv_lora_rank=c.kv_lora_rank,
        nope_dim=c.qk_nope_head_dim,
        rope_dim=c.qk_rope_head_dim,
        v_dim=c.v_head_dim,
        rope=Rope(c.qk_rope_head_dim, c.rope_theta, c.rope_scaling),
    )


def grouped_attention(
    c: GroupedHeads, layer: int, qkv_bias: bool = False, output_bias: bool = False
) -> GroupedQueryAttention:
    """Multi-head or grouped-query attention of the layer with this index."""
    return GroupedQueryAttention(
        layer,
        c.hidden_size,
        c.num_attention_heads,
        c.kv_heads,
        c.head_width,
        Rope(c.head_width, c.rope_theta, c.rope_scaling),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
    )
