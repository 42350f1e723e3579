"""DeepSeek-V3.2: the wiring (V3.2-Exp §2). V3 in which every attention, the MTP module's too, has an indexer."""

from nautile.layers.attention.indexer import Indexer
from nautile.layers.attention.sparse_mla import SparseMLA
from nautile.layers.block import Block
from nautile.layers.rope import Rope
from nautile.models.causal_lm import CausalLM
from nautile.models.deepseek_v32.config import DeepseekV32Config
from nautile.models.wiring import dense, mixture


class DeepseekV32ForCausalLM(CausalLM):
    """Sparse latent attention in every layer, dense SwiGLUs at the bottom, experts above, MTP modules on top.

    Args:
        config: The shape.
        experts: The routed experts that this process holds; None for all.
    """

    def __init__(self, config: DeepseekV32Config, experts: range | None = None) -> None:
        config.check()
        layers, depth = config.num_hidden_layers, config.num_nextn_predict_layers
        blocks = [build_block(config, layer, experts) for layer in range(layers + depth)]
        super().__init__(config, blocks[:layers], blocks[layers:])


def build_block(c: DeepseekV32Config, layer: int, experts: range | None = None) -> Block:
    """Block of global index `layer`; those of the MTP modules count on from the decoder's."""
    mlp = mixture(c, experts) if c.has_experts(layer) else dense(c)
    return Block(c.hidden_size, c.rms_norm_eps, sparse_attention(c, layer), mlp)


def sparse_attention(c: DeepseekV32Config, layer: int) -> SparseMLA:
    """Latent attention behind an indexer."""
    assert c.q_lora_rank is not None, "DeepseekV32Config.rules refuses a model without a query latent"
    return SparseMLA(
        layer,
        c.hidden_size,
        c.num_attention_heads,
        q_lora_rank=c.q_lora_rank,
        kv_lora_rank=c.kv_lora_rank,
        nope_dim=c.qk_nope_head_dim,
        rope_dim=c.qk_rope_head_dim,
        v_dim=c.v_head_dim,
        rope=Rope(c.qk_rope_head_dim, c.rope_theta, c.rope_scaling),
        indexer=Indexer(
            c.hidden_size,
            c.q_lora_rank,
            c.index_n_heads,
            c.index_head_dim,
            rope_dim=c.qk_rope_head_dim,
            topk=c.index_topk,
            fp8=c.index_fp8,
        ),
    )
