"""Shape of a DeepSeek-V2 model: V2, V2.5, Coder-V2, their Lite versions, and VL2's language models with MLA."""

from dataclasses import dataclass, replace
from typing import ClassVar

from nautile.layers.rope_scaling import YarnScaling
from nautile.models.config import LatentHeads, RoutedExperts


@dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(LatentHeads, RoutedExperts):
    """A DeepSeek-V2 decoder: MLA and DeepSeekMoE (V2 paper, arXiv 2405.04434)."""

    MODEL_TYPE: ClassVar[str] = "deepseek_v2"
    ARCHITECTURE: ClassVar[str] = "DeepseekV2ForCausalLM"


V2_LITE = DeepseekV2Config(
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    first_k_dense_replace=1,
    num_attention_heads=16,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_scaling=YarnScaling(mscale=0.707, mscale_all_dim=0.707),
    max_position_embeddings=163840,
    bos_token_id=100000,
    eos_token_id=100001,
)
"""DeepSeek-V2-Lite and Coder-V2-Lite as published."""

V2_236B = replace(
    V2_LITE,
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=60,
    num_attention_heads=128,
    n_routed_experts=160,
    n_group=8,
    topk_group=3,
    topk_method="group_limited_greedy",
    routed_scaling_factor=16.0,
    q_lora_rank=1536,
)
"""DeepSeek-V2 as published; V2.5 and Coder-V2 have the same shape with other YaRN factors."""

PRESETS: dict[str, DeepseekV2Config] = {"v2-lite": V2_LITE, "v2-236b": V2_236B}
