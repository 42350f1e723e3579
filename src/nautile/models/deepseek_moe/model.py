"""DeepSeekMoE-16B: the wiring (arXiv 2401.06066 §3)."""

from nautile.layers.block import Block
from nautile.models.causal_lm import CausalLM
from nautile.models.deepseek_moe.config import DeepseekConfig
from nautile.models.wiring import dense, grouped_attention, mixture


class DeepseekForCausalLM(CausalLM):
    """Multi-head attention in every layer, one dense SwiGLU at the bottom, experts above.

    Args:
        config: The shape.
        experts: The routed experts that this process holds; None for all.
    """

    def __init__(self, config: DeepseekConfig, experts: range | None = None) -> None:
        config.check()
        super().__init__(config, [build_block(config, layer, experts) for layer in range(config.num_hidden_layers)])


def build_block(c: DeepseekConfig, layer: int, experts: range | None = None) -> Block:
    """Block of index `layer`."""
    attention = grouped_attention(c, layer, qkv_bias=c.attention_bias, output_bias=c.attention_bias)
    mlp = mixture(c, experts) if c.has_experts(layer) else dense(c)
    return Block(c.hidden_size, c.rms_norm_eps, attention, mlp)
