"""Shape of a Qwen2 model: the Qwen distills of R1."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nautile.models.config import GroupedHeads


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(GroupedHeads):
    """A Qwen2 decoder (arXiv 2407.10671): Llama's, with biases on queries, keys and values."""

    MODEL_TYPE: ClassVar[str] = "qwen2"
    ARCHITECTURE: ClassVar[str] = "Qwen2ForCausalLM"
    FIXED: ClassVar[Mapping[str, Any]] = {"use_sliding_window": False}


R1_DISTILL_QWEN_1_5B = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=131072,
    bos_token_id=151643,
    eos_token_id=151643,
)
"""DeepSeek-R1-Distill-Qwen-1.5B as published."""

R1_DISTILL_QWEN_7B = replace(
    R1_DISTILL_QWEN_1_5B,
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
)
"""DeepSeek-R1-Distill-Qwen-7B as published."""

R1_DISTILL_QWEN_14B = replace(
    R1_DISTILL_QWEN_7B,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    rope_theta=1000000.0,
    rms_norm_eps=1e-5,
)
"""DeepSeek-R1-Distill-Qwen-14B as published."""

R1_DISTILL_QWEN_32B = replace(R1_DISTILL_QWEN_14B, intermediate_size=27648, num_hidden_layers=64)
"""DeepSeek-R1-Distill-Qwen-32B as published."""

PRESETS: dict[str, Qwen2Config] = {
    "r1-distill-qwen-1.5b": R1_DISTILL_QWEN_1_5B,
    "r1-distill-qwen-7b": R1_DISTILL_QWEN_7B,
    "r1-distill-qwen-14b": R1_DISTILL_QWEN_14B,
    "r1-distill-qwen-32b": R1_DISTILL_QWEN_32B,
}
