"""DeepSeek-V2: the wiring (V2 paper, arXiv 2405.04434, §2)."""

from nautile.layers.block import Block
from nautile.models.causal_lm import CausalLM
from nautile.models.deepseek_v2.config import DeepseekV2Config
from nautile.models.wiring import dense, latent_attention, mixture


class DeepseekV2ForCausalLM(CausalLM):
    """Latent attention in every layer, one dense SwiGLU at the bottom, experts above.

    Args:
        config: The shape.
        experts: The routed experts that this process holds; None for all.
    """

    def __init__(self, config: DeepseekV2Config, experts: range | None = None) -> None:
        config.check()
        super().__init__(config, [build_block(config, layer, experts) for layer in range(config.num_hidden_layers)])


def build_block(c: DeepseekV2Config, layer: int, experts: range | None = None) -> Block:
    """Block of index `layer`."""
    mlp = mixture(c, experts) if c.has_experts(layer) else dense(c)
    return Block(c.hidden_size, c.rms_norm_eps, latent_attention(c, layer), mlp)
