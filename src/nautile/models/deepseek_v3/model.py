"""DeepSeek-V3: the wiring (V3 paper, arXiv 2412.19437, §2)."""

from nautile.layers.block import Block
from nautile.models.causal_lm import CausalLM
from nautile.models.deepseek_v3.config import DeepseekV3Config
from nautile.models.wiring import dense, latent_attention, mixture


class DeepseekV3ForCausalLM(CausalLM):
    """Latent attention in every layer, dense SwiGLUs at the bottom, experts above, MTP modules on top.

    Args:
        config: The shape.
        experts: The routed experts that this process holds; None for all.
    """

    def __init__(self, config: DeepseekV3Config, experts: range | None = None) -> None:
        config.check()
        layers, depth = config.num_hidden_layers, config.num_nextn_predict_layers
        blocks = [build_block(config, layer, experts) for layer in range(layers + depth)]
        super().__init__(config, blocks[:layers], blocks[layers:])


def build_block(c: DeepseekV3Config, layer: int, experts: range | None = None) -> Block:
    """Block of global index `layer`; those of the MTP modules count on from the decoder's."""
    mlp = mixture(c, experts) if c.has_experts(layer) else dense(c)
    return Block(c.hidden_size, c.rms_norm_eps, latent_attention(c, layer), mlp)
