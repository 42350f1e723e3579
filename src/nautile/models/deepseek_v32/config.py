"""Shape of a DeepSeek-V3.2 model: V3's fields and the indexer's, published values, and a small one for CPUs.

Nothing here imports torch, so that ``--help`` and `check` answer at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from nautile.layers.rope_scaling import YarnScaling
from nautile.models.config import LatentHeads, MultiTokenPrediction, RoutedExperts, Rule


@dataclass(frozen=True, kw_only=True)
class DeepseekV32Config(MultiTokenPrediction, LatentHeads, RoutedExperts):
    """A DeepSeek-V3.2 decoder: V3 whose attention reads what a lightning indexer selects (V3.2-Exp §2)."""

    MODEL_TYPE: ClassVar[str] = "deepseek_v32"
    ARCHITECTURE: ClassVar[str] = "DeepseekV32ForCausalLM"
    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = ("index_n_heads", "index_head_dim", "index_topk")

    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    aux_loss_alpha: float = 0.0001
    """Weight of the sequence-wise balance loss; the published file leaves it out, the paper trained with 0.0001."""
    index_n_heads: int = 64
    """Heads J of the indexer; they share one key."""
    index_head_dim: int = 128
    """Dimensions I of an indexer head; the first qk_rope_head_dim of them are rotated."""
    index_topk: int = 2048
    """Past tokens that a query reads, at most."""
    index_fp8: bool = False
    """Round the indexer's queries and keys to FP8 after a Hadamard rotation, as DeepSeek's code does on its GPUs. False
    computes the scores exactly, as transformers does. A field of ours: published files do not have it."""

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        width, turned = self.index_head_dim, self.qk_rope_head_dim
        yield self.q_lora_rank is not None, "q_lora_rank null", "the indexer's queries are made from the query latent"
        yield (
            turned <= width,
            f"index_head_dim {width} with qk_rope_head_dim {turned}",
            "the indexer rotates as many dimensions as the attention beside it",
        )
        yield (
            not self.index_fp8 or width & (width - 1) == 0,
            f"index_fp8 with index_head_dim {width}",
            "Hadamard matrices of Sylvester's kind have a power of two rows",
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model; `index_fp8` is left out where it changes nothing."""
        published = super().to_hf()
        if not self.index_fp8:
            del published["index_fp8"]
        return published


V32_685B = DeepseekV32Config(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    num_attention_heads=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_scaling=YarnScaling(),
    max_position_embeddings=163840,
    bos_token_id=0,
    eos_token_id=1,
)
"""DeepSeek-V3.2-Exp and V3.2 as published."""

V32_MICRO = DeepseekV32Config(
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
    routed_scaling_factor=2.5,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    index_n_heads=16,
    index_head_dim=32,
    index_topk=128,
    max_position_embeddings=1024,
    initializer_range=0.0367,  # 0.006·√(7168/D), as V3's small presets
    bos_token_id=0,
    eos_token_id=1,
)
"""Every mechanism of V3.2 at a size that two CPU cores run; from 129 tokens on it selects."""

V32_NANO = replace(
    V32_MICRO,
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=160,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    n_routed_experts=8,
    num_experts_per_tok=2,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    index_head_dim=16,
    index_topk=32,
    max_position_embeddings=512,
    initializer_range=0.0635,
)
"""The smallest model in which everything still happens: for tests and for reading along."""

PRESETS: dict[str, DeepseekV32Config] = {"v32-685b": V32_685B, "v32-micro": V32_MICRO, "v32-nano": V32_NANO}
