"""Shape of a DeepSeekMoE model."""

from dataclasses import dataclass
from typing import ClassVar

from nautile.models.config import GroupedHeads, RoutedExperts


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(GroupedHeads, RoutedExperts):
    """A DeepSeekMoE decoder (arXiv 2401.06066): Llama's attention, a mixture of fine-grained and shared experts."""

    MODEL_TYPE: ClassVar[str] = "deepseek"
    ARCHITECTURE: ClassVar[str] = "DeepseekForCausalLM"

    attention_bias: bool = False
    """Queries, keys, values and output have biases."""


MOE_16B = DeepseekConfig(
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=28,
    first_k_dense_replace=1,
    num_attention_heads=16,
    num_key_value_heads=16,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    max_position_embeddings=4096,
    bos_token_id=100000,
    eos_token_id=100001,
)
"""DeepSeekMoE-16B as published."""

PRESETS: dict[str, DeepseekConfig] = {"moe-16b": MOE_16B}
