"""Shape of a DeepSeek-V3 model: Hugging Face field names, published values, and two small ones for CPUs.

Nothing here imports torch, so that ``--help`` and `check` answer at once.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from nautile.layers.rope_scaling import YarnScaling
from nautile.models.config import LatentHeads, MultiTokenPrediction, RoutedExperts


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(MultiTokenPrediction, LatentHeads, RoutedExperts):
    """A DeepSeek-V3 decoder: MLA, DeepSeekMoE, multi-token prediction (V3 paper, arXiv 2412.19437, §2 and §4.2).

    The defaults are the published V3, R1 and V3.1.
    """

    MODEL_TYPE: ClassVar[str] = "deepseek_v3"
    ARCHITECTURE: ClassVar[str] = "DeepseekV3ForCausalLM"

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_attention_heads: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    aux_loss_alpha: float = 0.0001
    """Weight of the sequence-wise balance loss; the published file leaves it out, the paper trained with 0.0001."""
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_scaling: YarnScaling | None = None
    """YaRN extension; null for plain RoPE."""
    initializer_range: float = 0.006
    """Standard deviation of the initial weights. V3 trained with 0.006 at D = 7168 (§4.2), that is 0.51/√D: a product
    with a normalised input starts with half its scale. The small presets keep σ·√D, not σ, so σ = 0.006·√(7168/D)."""
    bos_token_id: int = 0
    """Id that begins a document."""
    eos_token_id: int | tuple[int, ...] | None = 1
    """Id that ends a document."""


V3_671B = DeepseekV3Config(
    rope_scaling=YarnScaling(),
    max_position_embeddings=163840,
    initializer_range=0.02,  # what the published file says; the paper trained with 0.006
)
"""DeepSeek-V3 / R1 / V3.1 as published."""

V3_MICRO = DeepseekV3Config(
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    moe_intermediate_size=96,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=4,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    max_position_embeddings=1024,
    initializer_range=0.0367,
)
"""Every mechanism of V3 at a size that two CPU cores pre-train in minutes."""

V3_NANO = replace(
    V3_MICRO,
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=160,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    max_position_embeddings=512,
    initializer_range=0.0635,
)
"""The smallest model in which everything still happens: for tests and for reading along."""

PRESETS: dict[str, DeepseekV3Config] = {"v3-671b": V3_671B, "v3-micro": V3_MICRO, "v3-nano": V3_NANO}
