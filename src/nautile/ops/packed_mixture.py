"""The routed experts of a mixture with packed weights, for decoding: only chosen experts are read."""

import torch
from torch import Tensor

from nautile.ops.checks import looks_at_values
from nautile.ops.cpu.support import needs_gradient
from nautile.ops.dispatch import implementation
from nautile.ops.packed_nodes import packed_experts_node, parts
from nautile.ops.packed_weight import PackedWeight
from nautile.ops.precision import compute_dtype


def packed_experts(
    x_TD: Tensor, gate_up: PackedWeight, down: PackedWeight, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """`nautile.ops.grouped_swiglu` with the weights that `PackedWeight.unpack` gives; in the compute dtype.

    ``y_t = Σ_k w_tk · W_down[e] (silu(W_gate[e] x_t) ⊙ W_up[e] x_t)`` with e = experts_tk. Sums are in float32 or
    better. Differentiable in x and the routing weights; the packed weights are constant.

    Args:
        x_TD: Tokens.
        gate_up: Packed [E, 2F, D]: the F gate rows of each expert, then its F up rows.
        down: Packed [E, D, F]; its kind may differ.
        experts_TK: int64 in [0, E).
        weights_TK: Factor of each choice.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together; a choice is no expert.
    """
    if x_TD.dim() != 2 or len(gate_up.shape) != 3 or gate_up.inputs != x_TD.shape[1] or not x_TD.is_floating_point():
        raise ValueError(
            "packed_experts: want floating x [T, D] and packed gate_up [E, 2F, D], got "
            f"{x_TD.dtype} {list(x_TD.shape)} and {list(gate_up.shape)}"
        )
    E, F2, D = gate_up.shape
    if F2 % 2 or down.shape != (E, D, F2 // 2):
        raise ValueError(
            f"packed_experts: down must be [E, D, F] = {[E, D, F2 // 2]} for gate_up {[E, F2, D]}, "
            f"got {list(down.shape)}"
        )
    if experts_TK.dim() != 2 or experts_TK.shape[0] != x_TD.shape[0] or experts_TK.dtype != torch.int64:
        raise ValueError(
            f"packed_experts: experts must be int64 [T, K] with T = {x_TD.shape[0]}, "
            f"got {experts_TK.dtype} {list(experts_TK.shape)}"
        )
    if weights_TK.shape != experts_TK.shape:
        raise ValueError(
            f"packed_experts: weights {list(weights_TK.shape)} must have the shape of experts {list(experts_TK.shape)}"
        )
    if len({x_TD.device, gate_up.device, down.device, experts_TK.device, weights_TK.device}) > 1:
        raise ValueError(
            f"packed_experts: all must be on one device, got x on {x_TD.device}, gate_up on {gate_up.device}, "
            f"down on {down.device}, experts on {experts_TK.device}, weights on {weights_TK.device}"
        )
    if experts_TK.numel() and looks_at_values(experts_TK):
        low, high = experts_TK.aminmax()
        if low < 0 or high >= E:
            raise ValueError(f"packed_experts: experts must lie in [0, {E}), got {int(low)} to {int(high)}")
    if torch.compiler.is_compiling() and not needs_gradient(x_TD, weights_TK):
        dtype = compute_dtype(x_TD)
        return packed_experts_node(x_TD, *parts(gate_up), *parts(down), experts_TK, weights_TK, dtype)
    return implementation("packed_experts", x_TD)(x_TD, gate_up, down, experts_TK, weights_TK)
