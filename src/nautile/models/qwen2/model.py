"""Qwen2: the wiring."""

from nautile.layers.block import Block
from nautile.models.causal_lm import CausalLM
from nautile.models.qwen2.config import Qwen2Config
from nautile.models.wiring import dense, grouped_attention


class Qwen2ForCausalLM(CausalLM):
    """Grouped-query attention with biases on queries, keys and values, and a dense SwiGLU in every layer."""

    def __init__(self, config: Qwen2Config) -> None:
        config.check()
        super().__init__(config, [build_block(config, layer) for layer in range(config.num_hidden_layers)])


def build_block(c: Qwen2Config, layer: int) -> Block:
    """Block of index `layer`."""
    return Block(c.hidden_size, c.rms_norm_eps, grouped_attention(c, layer, qkv_bias=True), dense(c))
