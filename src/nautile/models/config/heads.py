"""Fields of attention: heads that share keys in groups, or heads made from one latent."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nautile.layers.rope_scaling import YarnScaling
from nautile.models.config.base import DecoderConfig, Rule


@dataclass(frozen=True, kw_only=True)
class GroupedHeads(DecoderConfig):
    """Attention whose query heads share keys and values in groups; one head per group is plain multi-head attention."""

    num_key_value_heads: int | None = None
    """Heads of keys and values; null for one per query head."""
    head_dim: int | None = None
    """Dimensions of a head; null for hidden_size / num_attention_heads."""

    @classmethod
    def read_fields(cls, published: Mapping[str, Any]) -> dict[str, Any]:
        """As of every family, with YaRN's temperature as these families define it: of one mscale alone they know
        nothing, and none of them touches the softmax scale (`nautile.layers.rope`)."""
        values = super().read_fields(published)
        yarn = values["rope_scaling"]
        if isinstance(yarn, YarnScaling):
            rope = published.get("rope_parameters") or published["rope_scaling"]
            both = rope.get("mscale") and rope.get("mscale_all_dim")
            values["rope_scaling"] = yarn if both else replace(yarn, mscale=1.0, mscale_all_dim=0.0)
        return values

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        heads, groups = self.num_attention_heads, self.kv_heads
        yield (
            groups > 0 and heads % groups == 0,
            f"num_key_value_heads {groups} with num_attention_heads {heads}",
            "every key head serves as many query heads",
        )
        yield self.head_width % 2 == 0, f"a head of {self.head_width} dimensions", "RoPE turns pairs of dimensions"
        yield (
            self.head_dim is not None or self.hidden_size % heads == 0,
            f"hidden_size {self.hidden_size} with num_attention_heads {heads}",
            "heads divide the hidden state evenly unless head_dim says otherwise",
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model, without null where readers take it amiss."""
        published = {**super().to_hf(), "num_key_value_heads": self.kv_heads}
        if self.head_dim is None:
            del published["head_dim"]
        return published


@dataclass(frozen=True, kw_only=True)
class LatentHeads(DecoderConfig):
    """Multi-head latent attention (V2 paper, arXiv 2405.04434 §2.1)."""

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    )
    FIXED: ClassVar[Mapping[str, Any]] = {"attention_bias": False}
    ONLY: ClassVar[Mapping[str, Any]] = {"use_mla": True, "rope_interleave": True}

    q_lora_rank: int | None = None
    """Width of the query latent; null for one full query projection."""
    kv_lora_rank: int
    """Width C of the key-value latent, which is what the cache holds."""
    qk_nope_head_dim: int
    """Dimensions N of a head that carry no position."""
    qk_rope_head_dim: int
    """Dimensions R of a head that are rotated; the rotated key is shared by all heads."""
    v_head_dim: int
    """Value dimensions V of a head."""

    def rules(self) -> Iterator[Rule]:
        yield from super().rules()
        yield (
            self.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim {self.qk_rope_head_dim}",
            "RoPE turns pairs of dimensions",
        )
        yield (
            self.q_lora_rank is None or self.q_lora_rank > 0,
            f"q_lora_rank {self.q_lora_rank}",
            "null stands for none",
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model; published files repeat the number of heads."""
        return {**super().to_hf(), "num_key_value_heads": self.num_attention_heads}
