"""Llama: the wiring."""

from nautile.layers.block import Block
from nautile.models.causal_lm import CausalLM
from nautile.models.llama.config import LlamaConfig
from nautile.models.wiring import dense, grouped_attention


class LlamaForCausalLM(CausalLM):
    """Grouped-query attention and a dense SwiGLU in every layer."""

    def __init__(self, config: LlamaConfig) -> None:
        config.check()
        super().__init__(config, [build_block(config, layer) for layer in range(config.num_hidden_layers)])


def build_block(c: LlamaConfig, layer: int) -> Block:
    """Block of index `layer`."""
    attention = grouped_attention(c, layer, qkv_bias=c.attention_bias, output_bias=c.attention_bias)
    return Block(c.hidden_size, c.rms_norm_eps, attention, dense(c))
