"""Products with packed weights as nodes of a compiler's graph, which run what eager calls do; without gradients.

With a gradient to come, eager calls run the reference, and so a compiler may trace it. A `PackedWeight` travels as its
parts: data, scale, and `sizes` = outputs, inputs, group. Dims as in `packed` and `packed_mixture`.
"""

import torch
from torch import Tensor

from nautile.ops.attention_nodes import as_if
from nautile.ops.dispatch import implementation
from nautile.ops.packed_weight import Kind, PackedWeight


def parts(weight: PackedWeight) -> tuple[Tensor, Tensor | None, Kind, list[int]]:
    """What a node takes in place of a packed weight."""
    return weight.data, weight.scale, weight.kind, [weight.outputs, weight.inputs, weight.group]


@torch.library.custom_op("nautile::packed_linear", mutates_args=())
def packed_linear_node(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    kind: str,
    sizes: list[int],
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `nautile.ops.packed_linear`."""
    weight = PackedWeight(data, scale, kind, *sizes)  # pyrefly: ignore
    with as_if(x, dtype):
        return implementation("packed_linear", x)(x, weight, bias_O).contiguous()


@packed_linear_node.register_fake
def _(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    kind: str,
    sizes: list[int],
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sizes[0], dtype=dtype)


@torch.library.custom_op("nautile::packed_experts", mutates_args=())
def packed_experts_node(
    x_TD: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    gate_up_kind: str,
    gate_up_sizes: list[int],
    down: Tensor,
    down_scale: Tensor | None,
    down_kind: str,
    down_sizes: list[int],
    experts_TK: Tensor,
    weights_TK: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """See `nautile.ops.packed_experts`."""
    first = PackedWeight(gate_up, gate_up_scale, gate_up_kind, *gate_up_sizes)  # pyrefly: ignore
    second = PackedWeight(down, down_scale, down_kind, *down_sizes)  # pyrefly: ignore
    with as_if(x_TD, dtype):
        return implementation("packed_experts", x_TD)(x_TD, first, second, experts_TK, weights_TK).contiguous()


@packed_experts_node.register_fake
def _(
    x_TD: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    gate_up_kind: str,
    gate_up_sizes: list[int],
    down: Tensor,
    down_scale: Tensor | None,
    down_kind: str,
    down_sizes: list[int],
    experts_TK: Tensor,
    weights_TK: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return x_TD.new_empty(x_TD.shape, dtype=dtype)
