"""Shape of a DeepSeek-V3 model: Hugging Face field names, published values, and two small ones for CPUs.

Nothing here imports torch, so that ``--help`` and `check` answer at once.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from nautile.core.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """YaRN context extension (arXiv 2309.00071), as in a published config.json."""

    type: Literal["yarn"] = "yarn"
    """Kind of extension."""
    factor: float = 40.0
    """New context length over the original one."""
    original_max_position_embeddings: int = 4096
    """Context length, in tokens, that the model was first trained with."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this over the original context keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are slowed by the whole factor."""
    mscale: float = 1.0
    """Weight of the attention-temperature correction on the rotated part."""
    mscale_all_dim: float = 1.0
    """Weight of the attention-temperature correction on the whole softmax scale; 0 for none."""


_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class DeepseekV3Config:
    """A DeepSeek-V3 decoder: MLA, DeepSeekMoE, multi-token prediction (V3 paper, arXiv 2412.19437, §2 and §4.2)."""

    vocab_size: int = 129280
    """Rows of the embedding and of the output head."""
    hidden_size: int = 7168
    """Width D of the residual stream."""
    intermediate_size: int = 18432
    """Width of the SwiGLU in the first, dense layers."""
    moe_intermediate_size: int = 2048
    """Width F of one expert's SwiGLU."""
    num_hidden_layers: int = 61
    """Decoder layers, without the MTP modules."""
    first_k_dense_replace: int = 3
    """Layers at the bottom that keep a dense SwiGLU instead of experts."""
    num_attention_heads: int = 128
    """Query heads H."""
    n_routed_experts: int = 256
    """Experts E that the router chooses from."""
    n_shared_experts: int = 1
    """Experts that every token visits, stored as one SwiGLU of n_shared_experts × moe_intermediate_size."""
    num_experts_per_tok: int = 8
    """Routed experts K per token."""
    n_group: int = 8
    """Groups that the routed experts are divided into for node-limited routing."""
    topk_group: int = 4
    """Groups a token may choose its experts from."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """Affinity of a token to an expert: sigmoid (V3) or softmax (V2)."""
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    """Selection: noaux_tc adds the correction bias (V3), the others take the plain scores (V2)."""
    norm_topk_prob: bool = True
    """Divide the chosen experts' weights by their sum."""
    routed_scaling_factor: float = 2.5
    """Factor on the routed experts' weights."""
    q_lora_rank: int | None = 1536
    """Width of the query latent; null for one full query projection."""
    kv_lora_rank: int = 512
    """Width C of the key-value latent, which is what the cache holds."""
    qk_nope_head_dim: int = 128
    """Dimensions N of a head that carry no position."""
    qk_rope_head_dim: int = 64
    """Dimensions R of a head that are rotated; the rotated key is shared by all heads."""
    v_head_dim: int = 128
    """Value dimensions V of a head."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """YaRN extension; null for plain RoPE."""
    max_position_embeddings: int = 4096
    """Longest sequence, in tokens."""
    rms_norm_eps: float = 1e-6
    """Epsilon of the RMSNorms (the two latent norms of MLA always use 1e-6)."""
    num_nextn_predict_layers: int = 1
    """Depth of multi-token prediction: extra modules, each predicting one token further."""
    tie_word_embeddings: bool = False
    """Use the embedding as the output head."""
    initializer_range: float = 0.006
    """Standard deviation of the initial weights. V3 trained with 0.006 at D = 7168 (§4.2), that is 0.51/√D: a product
    with a normalised input starts with half its scale. The small presets keep σ·√D, not σ, so σ = 0.006·√(7168/D)."""
    bos_token_id: int = 0
    """Id that begins a document."""
    eos_token_id: int = 1
    """Id that ends a document."""

    def check(self) -> None:
        """Raise `UserError` if a field is impossible or two contradict each other."""
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise UserError(
                    f"model: {name} {getattr(self, name)} is not possible", "a model needs one", "give 1 or more"
                )
        rules = [
            (
                self.n_routed_experts % self.n_group == 0,
                f"n_routed_experts {self.n_routed_experts} with n_group {self.n_group}",
                "groups must be of equal size",
            ),
            (
                self.topk_group <= self.n_group,
                f"topk_group {self.topk_group} with n_group {self.n_group}",
                "a token cannot use more groups than there are",
            ),
            (
                self.topk_method != "noaux_tc" or self.n_group == 1 or self.n_routed_experts // self.n_group >= 2,
                f"n_group {self.n_group} with n_routed_experts {self.n_routed_experts}",
                "noaux_tc scores a group by its two best experts, so a group needs two",
            ),
            (
                self.num_experts_per_tok <= self.topk_group * (self.n_routed_experts // self.n_group),
                f"num_experts_per_tok {self.num_experts_per_tok}",
                "the chosen groups hold fewer experts than a token needs",
            ),
            (
                self.qk_rope_head_dim % 2 == 0,
                f"qk_rope_head_dim {self.qk_rope_head_dim}",
                "RoPE turns pairs of dimensions",
            ),
            (
                0 <= self.first_k_dense_replace <= self.num_hidden_layers,
                f"first_k_dense_replace {self.first_k_dense_replace} with num_hidden_layers {self.num_hidden_layers}",
                "there are fewer layers than dense layers",
            ),
            (
                self.num_nextn_predict_layers >= 0,
                f"num_nextn_predict_layers {self.num_nextn_predict_layers}",
                "it counts the MTP modules; 0 is a model without one",
            ),
        ]
        for holds, what, why in rules:
            if not holds:
                raise UserError(f"model: {what} is not possible", why, "change the value in the recipe's model section")

    @classmethod
    def from_hf(cls, published: Mapping[str, Any]) -> "DeepseekV3Config":
        """Read a config.json in the published spelling or in transformers 5's (`rope_parameters`)."""
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in published.items() if key in known}
        values.setdefault("initializer_range", 0.02)  # the Hugging Face default when the file is silent
        rope = published.get("rope_scaling") or {}
        if "rope_parameters" in published:
            rope = dict(published["rope_parameters"])
            values["rope_theta"] = rope.pop("rope_theta", published.get("rope_theta", 10000.0))
        values["rope_scaling"] = _read_rope(rope)
        for name in ("bos_token_id", "eos_token_id"):
            if values.get(name) is None:
                values.pop(name, None)
        # Older files leave these out; the class defaults of the published modelling code stand in.
        values.setdefault("num_nextn_predict_layers", 0)
        if published.get("scoring_func") is None:
            values.pop("scoring_func", None)
        if published.get("topk_method") is None:
            values.pop("topk_method", None)
        config = cls(**values)
        config.check()
        return config

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model, in the published spelling."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **asdict(self),
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "moe_layer_freq": 1,
            "use_cache": True,
        }


def _read_rope(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("type", rope.get("rope_type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise UserError(
            f"config.json: rope_scaling type {kind!r} is not known to deepseek_v3",
            "DeepSeek-V3 checkpoints use yarn or none",
            "check that the config.json belongs to a deepseek_v3 model",
        )
    known = {f.name for f in fields(RopeScaling)} - {"type"}
    # A file without the two mscales asks for no softmax correction (mscale_all_dim 0) and mscale 1.
    values: dict[str, Any] = {"mscale_all_dim": 0.0, **{k: v for k, v in rope.items() if k in known}}
    return RopeScaling(**values)


V3_671B = DeepseekV3Config(
    rope_scaling=RopeScaling(),
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
