"""The routed experts of a mixture: a SwiGLU per expert over the tokens that chose it."""

import torch
from torch import Tensor

from nautile.ops.dispatch import implementation


def grouped_swiglu(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Weighted sum of each token's experts.

    ``y_t = Σ_k w_tk · W_down[e] (silu(W_gate[e] x_t) ⊙ W_up[e] x_t)`` with e = experts_tk

    (DeepSeekMoE, arXiv 2401.06066, eq. 3 without the residual and the shared experts.) Differentiable in x, the two
    weight stacks and the routing weights. Experts without tokens get zero gradients.

    Args:
        x_TD: Tokens.
        gate_up_E2FD: [E, 2F, D]: the F gate rows of each expert, then its F up rows.
        down_EDF: [E, D, F].
        experts_TK: int64 in [0, E): the experts of each token. One expert may not be listed twice for a token unless
            the sum over both entries is meant.
        weights_TK: Factor of each choice.

    Returns:
        y_TD in the compute dtype (the autocast dtype under autocast, else the dtype of x).

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    if x_TD.dim() != 2 or gate_up_E2FD.dim() != 3 or gate_up_E2FD.shape[2] != x_TD.shape[1]:
        raise ValueError(
            "grouped_swiglu: want x [T, D] and gate_up [E, 2F, D], got "
            f"{list(x_TD.shape)} and {list(gate_up_E2FD.shape)}"
        )
    E, F2, D = gate_up_E2FD.shape
    if F2 % 2 or down_EDF.shape != (E, D, F2 // 2):
        raise ValueError(
            f"grouped_swiglu: down must be [E, D, F] = {[E, D, F2 // 2]} for gate_up {[E, F2, D]}, "
            f"got {list(down_EDF.shape)}"
        )
    if experts_TK.dim() != 2 or experts_TK.shape[0] != x_TD.shape[0] or experts_TK.dtype != torch.int64:
        raise ValueError(
            f"grouped_swiglu: experts must be int64 [T, K] with T = {x_TD.shape[0]}, "
            f"got {experts_TK.dtype} {list(experts_TK.shape)}"
        )
    if weights_TK.shape != experts_TK.shape:
        raise ValueError(
            f"grouped_swiglu: weights {list(weights_TK.shape)} must have the shape of experts {list(experts_TK.shape)}"
        )
    # Elsewhere the check would wait for the device, and torch.compile would leave its graph for it.
    if experts_TK.numel() and experts_TK.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = experts_TK.aminmax()
        if low < 0 or high >= E:
            raise ValueError(f"grouped_swiglu: experts must lie in [0, {E}), got {int(low)} to {int(high)}")
    return implementation("grouped_swiglu", x_TD)(x_TD, gate_up_E2FD, down_EDF, experts_TK, weights_TK)
