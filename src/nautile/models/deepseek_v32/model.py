"""DeepSeek-V3.2: the wiring (V3.2-Exp §2). V3 in which every attention, the MTP module's too, has an indexer."""

from nautile.layers.attention.indexer import Indexer
from nautile.layers.block import Block
from nautile.models.causal_lm import CausalLM
from nautile.models.deepseek_v32.config import DeepseekV32Config
from nautile.models.wiring import dense, latent_attention, mixture


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
    return Block(c.hidden_size, c.rms_norm_eps, latent_attention(c, layer, indexer(c)), mlp)


def indexer(c: DeepseekV32Config) -> Indexer:
    """What chooses the tokens that a layer's attention reads."""
    assert c.q_lora_rank is not None, "DeepseekV32Config.rules refuses a model without a query latent"
    return Indexer(
        c.hidden_size,
        c.q_lora_rank,
        c.index_n_heads,
        c.index_head_dim,
        rope_dim=c.qk_rope_head_dim,
        topk=c.index_topk,
        fp8=c.index_fp8,
    )
