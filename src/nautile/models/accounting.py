"""Parameters, FLOPs and bytes of a decoder, computed from its shape alone: nothing is allocated, no torch.

Letters: D hidden, H heads, N nope, R rope, V value, C key-value latent, E experts, K experts per token, S sequence
length. A multiply-add counts as two FLOPs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from nautile.models.shapes import Experts, GroupedAttention, Indexer, LatentAttention, Shape

FP8_BLOCK = 128
"""Side of the weight blocks that share one scale in a published FP8 checkpoint (V3 paper §3.3)."""


@dataclass(frozen=True)
class Matrix:
    """The weight [rows, columns] of a linear map, `copies` times."""

    rows: int
    columns: int
    copies: int = 1
    fp8: bool = True
    """Published V3 checkpoints store it in FP8 with block scales."""

    @property
    def numel(self) -> int:
        """Numbers in all copies."""
        return self.rows * self.columns * self.copies

    @property
    def scales(self) -> int:
        """Block scales of all copies; a partial block has one, too."""
        return ceil(self.rows / FP8_BLOCK) * ceil(self.columns / FP8_BLOCK) * self.copies if self.fp8 else 0


@dataclass(frozen=True)
class Part:
    """One named part of the model."""

    name: str
    total: int
    """Parameters stored."""
    active: int
    """Parameters that one token is multiplied with; of the embedding a token only reads one row, so 0 there."""


# ---------------------------------------------------------------------------------------------- matrices of a layer


def attention_matrices(shape: Shape) -> list[Matrix]:
    """The projections of one attention layer."""
    D, H, attention = shape.hidden, shape.heads, shape.attention
    if isinstance(attention, GroupedAttention):
        queries, keys = H * attention.head_dim, attention.kv_heads * attention.head_dim
        return [Matrix(queries, D), Matrix(keys, D), Matrix(keys, D), Matrix(D, queries)]
    queries = H * (attention.nope + attention.rope)
    rank = attention.q_lora_rank
    query = [Matrix(queries, D)] if rank is None else [Matrix(rank, D), Matrix(queries, rank)]
    latent = [
        Matrix(attention.kv_lora_rank + attention.rope, D),
        Matrix(H * (attention.nope + attention.value), attention.kv_lora_rank),
    ]
    return [*query, *latent, Matrix(D, H * attention.value), *_indexer_matrices(shape)]


def _indexer_matrices(shape: Shape) -> list[Matrix]:
    indexer = _indexer(shape)
    if indexer is None or not isinstance(shape.attention, LatentAttention):
        return []
    query_input = shape.attention.q_lora_rank or shape.hidden
    return [
        Matrix(indexer.heads * indexer.head_dim, query_input),
        Matrix(indexer.head_dim, shape.hidden),
        Matrix(indexer.heads, shape.hidden, fp8=False),
    ]


def swiglu_matrices(hidden: int, width: int, copies: int = 1) -> list[Matrix]:
    """Gate, up and down projection of a SwiGLU."""
    return [Matrix(width, hidden, copies), Matrix(width, hidden, copies), Matrix(hidden, width, copies)]


def _attention_vectors(shape: Shape) -> int:
    """Biases and latent norms of one attention layer."""
    attention = shape.attention
    if isinstance(attention, GroupedAttention):
        qkv = (shape.heads + 2 * attention.kv_heads) * attention.head_dim
        return qkv * attention.qkv_bias + shape.hidden * attention.output_bias
    index_norm = 2 * attention.indexer.head_dim if attention.indexer else 0  # a LayerNorm: weight and bias
    return attention.kv_lora_rank + (attention.q_lora_rank or 0) + index_norm


def _indexer(shape: Shape) -> Indexer | None:
    return shape.attention.indexer if isinstance(shape.attention, LatentAttention) else None


def _numel(matrices: Iterable[Matrix]) -> int:
    return sum(matrix.numel for matrix in matrices)


# ------------------------------------------------------------------------------------------------------- parameters


def _expert_parts(shape: Shape, experts: Experts) -> list[Part]:
    """The parts of one mixture-of-experts layer. The correction bias counts, as in a published checkpoint."""
    one = _numel(swiglu_matrices(shape.hidden, experts.width))
    shared = _numel(swiglu_matrices(shape.hidden, experts.width * experts.shared))
    router = experts.routed * (shape.hidden + experts.correction_bias)
    return [
        Part("routed experts", one * experts.routed, one * experts.per_token),
        Part("shared experts", shared, shared),
        Part("router", router, router),
    ]


def parameters(shape: Shape) -> list[Part]:
    """Parameters of the main model by part, without multi-token prediction.

    Biases of the router are included although nautile keeps them in buffers, because published totals include them.
    """
    attention = (_numel(attention_matrices(shape)) + _attention_vectors(shape)) * shape.layers
    dense = _numel(swiglu_matrices(shape.hidden, shape.dense_width)) * shape.dense_layers
    norms = shape.hidden * (2 * shape.layers + 1)
    embedding = shape.vocab * shape.hidden
    parts = [Part("embedding", embedding, 0), Part("attention", attention, attention)]
    parts += [Part("dense feed-forward", dense, dense)] if dense else []
    if shape.experts and shape.moe_layers:
        parts += [
            Part(part.name, part.total * shape.moe_layers, part.active * shape.moe_layers)
            for part in _expert_parts(shape, shape.experts)
        ]
    return [*parts, Part("norms", norms, norms), Part("output head", 0 if shape.tied else embedding, embedding)]


def mtp_parameters(shape: Shape) -> Part:
    """Parameters of the MTP modules, beside the embedding and head that they share (V3 paper §2.2)."""
    attention = _numel(attention_matrices(shape)) + _attention_vectors(shape)
    # Two norms of the layer, two of the inputs, one before the head; and the projection [h; embedding] → D.
    own = 5 * shape.hidden + 2 * shape.hidden**2
    if shape.experts:
        feed_forward = _expert_parts(shape, shape.experts)
    else:
        dense = _numel(swiglu_matrices(shape.hidden, shape.dense_width))
        feed_forward = [Part("dense feed-forward", dense, dense)]
    total = attention + own + sum(part.total for part in feed_forward)
    active = attention + own + sum(part.active for part in feed_forward)
    return Part("MTP modules", total * shape.mtp_modules, active * shape.mtp_modules)


def total(parts: Iterable[Part]) -> Part:
    """The sum of parts."""
    parts = list(parts)
    return Part("total", sum(part.total for part in parts), sum(part.active for part in parts))


def fp8_scales(shape: Shape) -> int:
    """Block scales in an FP8 checkpoint: one per 128 × 128 block of every projection of every layer, MTP included."""
    attention = sum(matrix.scales for matrix in attention_matrices(shape))
    dense = sum(matrix.scales for matrix in swiglu_matrices(shape.hidden, shape.dense_width))
    if shape.experts is None:
        return (shape.layers + shape.mtp_modules) * (attention + dense)
    experts = shape.experts
    routed = swiglu_matrices(shape.hidden, experts.width, experts.routed)
    shared = swiglu_matrices(shape.hidden, experts.width * experts.shared)
    moe = sum(matrix.scales for matrix in [*routed, *shared])
    moe_layers = shape.moe_layers + shape.mtp_modules
    return (shape.layers + shape.mtp_modules) * attention + shape.dense_layers * dense + moe_layers * moe


def published_fp8_numbers(shape: Shape) -> int:
    """Numbers in the checkpoint as DeepSeek publishes it.

    The model with its MTP modules, each of which carries copies of embedding and head, and all FP8 scales.
    684,531,386,000 for V3, where the model itself has 671,026,419,200 parameters.
    """
    copies = shape.mtp_modules * 2 * shape.vocab * shape.hidden
    return total(parameters(shape)).total + mtp_parameters(shape).total + copies + fp8_scales(shape)


# ------------------------------------------------------------------------------------------------------------ FLOPs


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token."""

    weights: float
    """Multiplications with weights: 2 per active parameter."""
    attention: float
    """Scores and weighted sums over the context."""

    @property
    def all(self) -> float:
        """Both."""
        return self.weights + self.attention

    def times(self, factor: float) -> "Flops":
        """Both, multiplied."""
        return Flops(self.weights * factor, self.attention * factor)


def prefill_flops(shape: Shape, sequence_length: int) -> Flops:
    """Forward FLOPs per token of a whole sequence, attention in the expanded form: the mean over a causal row."""
    context = (sequence_length + 1) / 2
    indexer = _indexer(shape)
    attended = context if indexer is None else _mean_capped(sequence_length, indexer.top_k)
    per_layer = 2 * shape.heads * sum(_score_and_value_dims(shape)) * attended + _indexer_flops(indexer, context)
    return Flops(2.0 * total(parameters(shape)).active, per_layer * shape.layers)


def train_flops(shape: Shape, sequence_length: int) -> Flops:
    """Training FLOPs per token without MTP: backward costs twice the forward, hence three times the latter.

    The figures of the V3 hardware paper (arXiv 2505.09343, table 2) at 4,096 tokens: 250 GFLOP for V3, 155 for V2.
    """
    return prefill_flops(shape, sequence_length).times(3)


def mtp_train_flops(shape: Shape, sequence_length: int) -> Flops:
    """What the MTP modules add to `train_flops`: their layers, and the shared head once more per module."""
    per_layer = prefill_flops(shape, sequence_length).attention / shape.layers
    head = shape.vocab * shape.hidden * shape.mtp_modules
    return Flops(2.0 * (mtp_parameters(shape).active + head), per_layer * shape.mtp_modules).times(3)


def decode_flops(shape: Shape, context: int) -> Flops:
    """FLOPs of one new token after `context` cached ones; latent attention in the absorbed form (V2 paper §2.1.2).

    Absorbed, every head scores and sums latents: C + R and C dimensions where the expanded form has N + R and V, but
    no key or value is ever expanded.
    """
    attention, indexer = shape.attention, _indexer(shape)
    if isinstance(attention, LatentAttention):
        dims = 2 * attention.kv_lora_rank + attention.rope
    else:
        dims = 2 * attention.head_dim
    attended = context if indexer is None else min(context, indexer.top_k)
    per_layer = 2 * shape.heads * dims * attended + _indexer_flops(indexer, context)
    return Flops(2.0 * total(parameters(shape)).active, per_layer * shape.layers)


def _score_and_value_dims(shape: Shape) -> tuple[int, int]:
    attention = shape.attention
    if isinstance(attention, LatentAttention):
        return attention.nope + attention.rope, attention.value
    return attention.head_dim, attention.head_dim


def _indexer_flops(indexer: Indexer | None, context: float) -> float:
    return 2 * indexer.heads * indexer.head_dim * context if indexer else 0.0


def _mean_capped(length: int, cap: int) -> float:
    """Mean of min(t, cap) over t = 1..length."""
    ramp = min(length, cap)
    return (ramp * (ramp + 1) / 2 + (length - ramp) * cap) / length


# ------------------------------------------------------------------------------------------------------------ cache


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


def grouped_cache_cost(shape: Shape, groups: int | None = None) -> CacheCost:
    """The cache that the same heads would need with keys and values per group; None: one group per head, MHA.

    A head has N dimensions here, as in table 1 of the V2 paper: 2·groups·N elements per layer.
    """
    attention = shape.attention
    head_dim = attention.nope if isinstance(attention, LatentAttention) else attention.head_dim
    name = "as MHA" if groups is None else f"as GQA, {groups} groups"
    return CacheCost(name, 2 * (groups or shape.heads) * head_dim * shape.layers)
