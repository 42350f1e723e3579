"""Parameters by part: how many are stored, and how many one token is multiplied with."""

from collections.abc import Iterable
from dataclasses import dataclass

from nautile.models.accounting.matrices import Matrix, attention_matrices, attention_vectors, numel, swiglu_matrices
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
    own = attention + 5 * shape.hidden + 2 * shape.hidden**2
    mixture = _expert_parts(shape, shape.experts) if shape.experts else []
    moe, modules = shape.mtp_moe_modules, shape.mtp_modules
    dense = numel(swiglu_matrices(shape.hidden, shape.dense_width)) * (modules - moe) + own * modules
    return Part(
        "MTP modules",
        dense + moe * sum(part.total for part in mixture),
        dense + moe * sum(part.active for part in mixture),
    )


def total(parts: Iterable[Part]) -> Part:
    """The sum of parts."""
    parts = list(parts)
    return Part("total", sum(part.total for part in parts), sum(part.active for part in parts))


def fp8_scales(shape: Shape) -> int:
    """Block scales in an FP8 checkpoint: one per 128 × 128 block of every projection of every layer, MTP included."""
    layers, moe = shape.layers + shape.mtp_modules, shape.moe_layers + shape.mtp_moe_modules
    attention = _scales(attention_matrices(shape))
    dense = _scales(swiglu_matrices(shape.hidden, shape.dense_width))
    experts = shape.experts
    if experts is None:
        return layers * (attention + dense)
    routed = _scales(swiglu_matrices(shape.hidden, experts.width, experts.routed))
    shared = _scales(swiglu_matrices(shape.hidden, experts.width * experts.shared))
    return layers * attention + (layers - moe) * dense + moe * (routed + shared)


def _scales(matrices: Iterable[Matrix]) -> int:
    return sum(matrix.scales for matrix in matrices)


def published_fp8_numbers(shape: Shape) -> int:
    """Numbers in the checkpoint as DeepSeek publishes it.

    The model with its MTP modules, each of which carries copies of embedding and head, and all FP8 scales.
    684,531,386,000 for V3, where the model itself has 671,026,419,200 parameters.
    """
    copies = shape.mtp_modules * 2 * shape.vocab * shape.hidden
    return total(parameters(shape)).total + mtp_parameters(shape).total + copies + fp8_scales(shape)
