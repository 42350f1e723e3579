"""Shape of a Llama model: DeepSeek-LLM, DeepSeek-Coder and the Llama distills of R1."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nautile.layers.rope_scaling import LinearScaling, Llama3Scaling
from nautile.models.config import GroupedHeads


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(GroupedHeads):
    """A Llama decoder (arXiv 2302.13971; grouped queries since arXiv 2307.09288)."""

    MODEL_TYPE: ClassVar[str] = "llama"
    ARCHITECTURE: ClassVar[str] = "LlamaForCausalLM"
    FIXED: ClassVar[Mapping[str, Any]] = {"mlp_bias": False}

    attention_bias: bool = False
    """Queries, keys, values and output have biases."""


CODER_6_7B = LlamaConfig(
    vocab_size=32256,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    rope_theta=100000.0,
    rope_scaling=LinearScaling(factor=4.0),
    max_position_embeddings=16384,
    bos_token_id=32013,
    eos_token_id=32014,
)
"""DeepSeek-Coder 6.7B as published."""

CODER_1_3B = replace(
    CODER_6_7B,
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
)
"""DeepSeek-Coder 1.3B as published."""

CODER_33B = replace(
    CODER_6_7B,
    hidden_size=7168,
    intermediate_size=19200,
    num_hidden_layers=62,
    num_attention_heads=56,
    num_key_value_heads=8,
)
"""DeepSeek-Coder 33B as published."""

LLM_7B = LlamaConfig(
    vocab_size=102400,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=30,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    bos_token_id=100000,
    eos_token_id=100001,
)
"""DeepSeek LLM 7B (arXiv 2401.02954, table 2)."""

LLM_67B = replace(
    LLM_7B,
    hidden_size=8192,
    intermediate_size=22016,
    num_hidden_layers=95,
    num_attention_heads=64,
    num_key_value_heads=8,
)
"""DeepSeek LLM 67B, the dense predecessor against which the V2 paper states its savings."""

R1_DISTILL_LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rope_theta=500000.0,
    rope_scaling=Llama3Scaling(),
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    bos_token_id=128000,
    eos_token_id=128001,
)
"""DeepSeek-R1-Distill-Llama-8B as published."""

R1_DISTILL_LLAMA_70B = replace(
    R1_DISTILL_LLAMA_8B,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
)
"""DeepSeek-R1-Distill-Llama-70B as published."""

PRESETS: dict[str, LlamaConfig] = {
    "coder-1.3b": CODER_1_3B,
    "coder-6.7b": CODER_6_7B,
    "coder-33b": CODER_33B,
    "deepseek-llm-7b": LLM_7B,
    "deepseek-llm-67b": LLM_67B,
    "r1-distill-llama-8b": R1_DISTILL_LLAMA_8B,
    "r1-distill-llama-70b": R1_DISTILL_LLAMA_70B,
}
