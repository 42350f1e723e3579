"""The shape of a decoder, read from any published config.json: what the accounting needs and nothing else.

A shape is not a model: other makers' families that nautile does not build (Mistral, Kimi K2) can be planned, too.
Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nautile.core.errors import UserError
from nautile.core.nearest import nearest


@dataclass(frozen=True)
class Indexer:
    """The lightning indexer of DeepSeek Sparse Attention (V3.2 paper §2.1)."""

    heads: int
    """Indexer heads."""
    head_dim: int
    """Dimensions of one indexer head; the single shared key has as many."""
    top_k: int
    """Past tokens that the main attention reads."""


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (V2 paper §2.1)."""

    q_lora_rank: int | None
    """Width of the query latent; None for one full query projection."""
    kv_lora_rank: int
    """Width C of the key-value latent."""
    nope: int
    """Dimensions N of a head without position."""
    rope: int
    """Rotated dimensions R of a head."""
    value: int
    """Value dimensions V of a head."""
    indexer: Indexer | None = None
    """Sparse selection in front of it (V3.2)."""


@dataclass(frozen=True)
class GroupedAttention:
    """Grouped-query attention; multi-head when every query head has its own keys, multi-query with one key head."""

    kv_heads: int
    """Heads that keys and values have."""
    head_dim: int
    """Dimensions of a head."""
    qkv_bias: bool = False
    """The query, key and value projections have a bias (Qwen2)."""
    output_bias: bool = False
    """The output projection has one."""


@dataclass(frozen=True)
class Experts:
    """A mixture of fine-grained routed and shared experts (DeepSeekMoE paper §3)."""

    routed: int
    """Experts E to choose from."""
    shared: int
    """Experts every token visits."""
    per_token: int
    """Routed experts K per token."""
    width: int
    """SwiGLU width F of one expert."""
    first_dense: int
    """Layers at the bottom that keep a dense SwiGLU."""
    correction_bias: bool
    """The router has one correction bias per expert (auxiliary-loss-free balancing, V3 paper §2.1.2)."""
    every: int = 1
    """Above the dense layers, those whose index this divides have experts (`moe_layer_freq`)."""


@dataclass(frozen=True)
class Shape:
    """Everything that parameter, FLOP and memory counts depend on."""

    name: str
    """What tables call it."""
    vocab: int
    """Rows of the embedding."""
    hidden: int
    """Width D of the residual stream."""
    layers: int
    """Decoder layers, without MTP modules."""
    heads: int
    """Query heads H."""
    dense_width: int
    """SwiGLU width of a dense layer."""
    attention: LatentAttention | GroupedAttention
    """The attention of every layer."""
    experts: Experts | None = None
    """None for a dense model."""
    tied: bool = False
    """The embedding is the output head."""
    mtp_modules: int = 0
    """Multi-token-prediction modules (V3 paper §2.2)."""
    context: int = 4096
    """Longest sequence, in tokens."""

    @property
    def indexer(self) -> Indexer | None:
        """The indexer of sparse attention, if there is one."""
        return self.attention.indexer if isinstance(self.attention, LatentAttention) else None

    def has_experts(self, layer: int) -> bool:
        """Whether the layer of this index is a mixture of experts; MTP modules count on from the decoder's layers."""
        return self.experts is not None and layer >= self.experts.first_dense and layer % self.experts.every == 0

    @property
    def moe_layers(self) -> int:
        """Decoder layers with experts."""
        return sum(map(self.has_experts, range(self.layers)))

    @property
    def dense_layers(self) -> int:
        """Decoder layers with a dense SwiGLU."""
        return self.layers - self.moe_layers

    @property
    def mtp_moe_modules(self) -> int:
        """MTP modules whose block has experts: all of them in what DeepSeek publishes."""
        return sum(map(self.has_experts, range(self.layers, self.layers + self.mtp_modules)))


def shape_from_config(published: Mapping[str, Any], name: str = "model") -> Shape:
    """The shape that a config.json describes.

    Raises:
        UserError: The model type is not one whose layers are known here, a field is missing, or projections have
            biases that the type does not normally have.
    """
    model_type = str(published.get("model_type", ""))
    try:
        if model_type in LATENT_TYPES:
            return _latent_shape(published, name)
        if model_type in GROUPED_TYPES:
            return _grouped_shape(published, name)
    except KeyError as missing:
        raise UserError(
            f"{name}: the config of type {model_type!r} has no field {missing}",
            "the count depends on it",
            "check that the file is the model's complete config.json",
        ) from None
    known = sorted(LATENT_TYPES | GROUPED_TYPES)
    near = nearest(model_type, known)
    raise UserError(
        f"{name}: model_type {model_type!r} cannot be planned",
        f"known shapes are {', '.join(known)}",
        f"did you mean {near!r}?" if near else "pass the config.json of the language model itself",
    )


LATENT_TYPES = {"deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"}
"""Model types with multi-head latent attention."""
GROUPED_TYPES = {"deepseek", "llama", "mistral", "qwen2"}
"""Model types with multi-head or grouped-query attention."""


def _latent_shape(published: Mapping[str, Any], name: str) -> Shape:
    if published.get("attention_bias"):
        raise UserError(
            f"{name}: attention_bias is true",
            "no published latent-attention model has attention biases, so they are not counted",
            "set attention_bias to false",
        )
    indexer = None
    if published["model_type"] == "deepseek_v32":
        indexer = Indexer(published["index_n_heads"], published["index_head_dim"], published["index_topk"])
    attention = LatentAttention(
        q_lora_rank=published.get("q_lora_rank"),
        kv_lora_rank=published["kv_lora_rank"],
        nope=published["qk_nope_head_dim"],
        rope=published["qk_rope_head_dim"],
        value=published["v_head_dim"],
        indexer=indexer,
    )
    return _shape(published, name, attention)


def _grouped_shape(published: Mapping[str, Any], name: str) -> Shape:
    heads = published["num_attention_heads"]
    bias = bool(published.get("attention_bias", False))
    attention = GroupedAttention(
        kv_heads=published.get("num_key_value_heads") or heads,
        head_dim=published.get("head_dim") or published["hidden_size"] // heads,
        qkv_bias=bias or published["model_type"] == "qwen2",
        output_bias=bias,
    )
    return _shape(published, name, attention)


def _shape(published: Mapping[str, Any], name: str, attention: LatentAttention | GroupedAttention) -> Shape:
    return Shape(
        name=name,
        vocab=published["vocab_size"],
        hidden=published["hidden_size"],
        layers=published["num_hidden_layers"],
        heads=published["num_attention_heads"],
        dense_width=published["intermediate_size"],
        attention=attention,
        experts=_experts(published),
        tied=bool(published.get("tie_word_embeddings", False)),
        mtp_modules=published.get("num_nextn_predict_layers") or 0,
        context=published.get("max_position_embeddings", 4096),
    )


def _experts(published: Mapping[str, Any]) -> Experts | None:
    if not published.get("n_routed_experts"):
        return None
    # deepseek_v3 files of transformers leave topk_method out: the class always corrects by a bias.
    corrected = published["model_type"] in {"deepseek_v3", "deepseek_v32", "kimi_k2"}
    method = published.get("topk_method") or ("noaux_tc" if corrected else "greedy")
    return Experts(
        routed=published["n_routed_experts"],
        shared=published.get("n_shared_experts") or 0,
        per_token=published["num_experts_per_tok"],
        width=published["moe_intermediate_size"],
        first_dense=_first_dense(published),
        correction_bias=method == "noaux_tc",
        every=published.get("moe_layer_freq") or 1,
    )


def _first_dense(published: Mapping[str, Any]) -> int:
    """Dense layers at the bottom; for V3.2, transformers 5 lists the kind of every layer, which goes before a count."""
    kinds = published.get("mlp_layer_types")
    if kinds:
        return kinds.index("sparse") if "sparse" in kinds else len(kinds)
    return published.get("first_k_dense_replace") or 0
