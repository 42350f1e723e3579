"""Floating-point operations per token. A multiply-add counts as two.

Letters: D hidden, H heads, N nope, R rope, V value, C key-value latent, S sequence length.
"""

from dataclasses import dataclass

from nautile.models.accounting.parameters import mtp_parameters, parameters, total
from nautile.models.accounting.shape import Indexer, LatentAttention, Shape


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
    indexer = shape.indexer
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
    attention, indexer = shape.attention, shape.indexer
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
