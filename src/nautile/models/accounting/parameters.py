"""Parameters by part: how many are stored, and how many one token is multiplied with."""

from collections.abc import Iterable
from dataclasses import dataclass

from nautile.models.accounting.matrices import attention_matrices, attention_vectors, numel, swiglu_matrices
from nautile.models.accounting.shape import Experts, Shape


@dataclass(frozen=True)
class Part:
    """One named part of the model."""

    name: str
    total: int
    """Parameters stored."""
    active: int
    """Parameters that one token is multiplied with; of the embedding a token only reads one row, so 0 there."""


def _expert_parts(shape: Shape, experts: Experts) -> list[Part]:
    """The parts of one mixture-of-experts layer. The correction bias counts, as in a published checkpoint."""
    one = numel(swiglu_matrices(shape.hidden, experts.width))
    shared = numel(swiglu_matrices(shape.hidden, experts.width * experts.shared))
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
    attention = (numel(attention_matrices(shape)) + attention_vectors(shape)) * shape.layers
    dense = numel(swiglu_matrices(shape.hidden, shape.dense_width)) * shape.dense_layers
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
    attention = numel(attention_matrices(shape)) + attention_vectors(shape)
    # Two norms of the layer, two of the inputs, one before the head; and the projection [h; embedding] → D.
    own = 5 * shape.hidden + 2 * shape.hidden**2
    if shape.experts:
        feed_forward = _expert_parts(shape, shape.experts)
    else:
        dense = numel(swiglu_matrices(shape.hidden, shape.dense_width))
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
