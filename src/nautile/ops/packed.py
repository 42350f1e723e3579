"""Matrix products with packed weights, for decoding: few rows, and all the time goes into reading the weight."""

import torch
from torch import Tensor

from nautile.ops.checks import same_device
from nautile.ops.cpu.support import needs_gradient
from nautile.ops.dispatch import implementation
from nautile.ops.packed_nodes import packed_linear_node, parts
from nautile.ops.packed_weight import PackedWeight
from nautile.ops.precision import compute_dtype


def packed_linear(x: Tensor, weight: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``, [..., D] → [..., O], where W is what `PackedWeight.unpack` gives; in the compute dtype.

    Sums are in float32 or better. Differentiable in x and the bias; the weight is constant.

    Raises:
        ValueError: The weight is a stack of matrices, or shapes do not fit together.
    """
    if len(weight.shape) != 2:
        raise ValueError(f"packed_linear: want one matrix [O, D], got {list(weight.shape)}: choose one by its index")
    if x.dim() < 1 or x.shape[-1] != weight.inputs or not x.is_floating_point():
        raise ValueError(
            f"packed_linear: want floating x [..., {weight.inputs}] for a weight {list(weight.shape)}, "
            f"got {x.dtype} {list(x.shape)}"
        )
    if bias_O is not None and bias_O.shape != torch.Size([weight.outputs]):
        raise ValueError(f"packed_linear: bias must be [{weight.outputs}], got {list(bias_O.shape)}")
    same_device("packed_linear", x=x, weight=weight.data, bias=bias_O)
    if torch.compiler.is_compiling() and not needs_gradient(x, *(() if bias_O is None else (bias_O,))):
        return packed_linear_node(x, *parts(weight), bias_O, compute_dtype(x))
    return implementation("packed_linear", x)(x, weight, bias_O)
