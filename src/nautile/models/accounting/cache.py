"""What the attention cache holds per token.

Letters: C key-value latent, R rope, N nope.
"""

from dataclasses import dataclass

from nautile.models.accounting.shape import GroupedAttention, LatentAttention, Shape


@dataclass(frozen=True)
class CacheCost:
    """What the attention cache holds per token, all layers together."""

    name: str
    elements: int

    def bytes(self, bits: float = 16) -> float:
        """Bytes per token at so many bits an element."""
        return self.elements * bits / 8


def cache_cost(shape: Shape) -> CacheCost:
    """The cache of the model as it is: C + R per layer in MLA (plus the indexer's key), 2·heads·dim otherwise."""
    attention = shape.attention
    if isinstance(attention, GroupedAttention):
        kind = {shape.heads: "MHA", 1: "MQA"}.get(attention.kv_heads, f"GQA, {attention.kv_heads} groups")
        return CacheCost(kind, 2 * attention.kv_heads * attention.head_dim * shape.layers)
    index_key = attention.indexer.head_dim if attention.indexer else 0
    per_layer = attention.kv_lora_rank + attention.rope + index_key
    return CacheCost("MLA and index keys" if index_key else "MLA", per_layer * shape.layers)


INDEX_KEY_SCALE_BITS = 32
"""V3.2 serves each index key in FP8 with one float32 scale (DeepSeek-V3.2-Exp, inference/model.py)."""


def index_key_cost(shape: Shape) -> CacheCost | None:
    """The part of the cache that the sparse attention's indexer reads: one key per layer; None without an indexer."""
    return CacheCost("index keys alone", shape.indexer.head_dim * shape.layers) if shape.indexer else None


def index_key_bits(shape: Shape) -> float:
    """Bits an element of an index key takes in FP8, its share of the scale included: 8.25 for keys of 128."""
    return 8 + INDEX_KEY_SCALE_BITS / shape.indexer.head_dim if shape.indexer else 0.0


def grouped_cache_cost(shape: Shape, groups: int | None = None) -> CacheCost:
    """The cache that the same heads would need with keys and values per group; None: one group per head, MHA.

    A head has N dimensions here, as in table 1 of the V2 paper: 2·groups·N elements per layer.
    """
    attention = shape.attention
    head_dim = attention.nope if isinstance(attention, LatentAttention) else attention.head_dim
    name = "MHA" if groups is None else f"GQA, {groups} groups"
    return CacheCost(name, 2 * (groups or shape.heads) * head_dim * shape.layers)
