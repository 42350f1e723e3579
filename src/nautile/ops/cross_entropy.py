"""Cross-entropy of a projection, without ever holding the logits of the whole batch."""

import torch
from torch import Tensor

from nautile.ops.dispatch import implementation

IGNORE = -100
"""Target of a token that does not count."""


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int = 1024) -> Tensor:
    """``Σ_t −log softmax(W x_t)[target_t]`` over the tokens whose target is not −100.

    Logits exist for `chunk` tokens at a time. Their gradients are computed in the same pass, so the forward of a call
    that needs gradients does the work of both directions and its backward only multiplies.

    Args:
        x_TD: Hidden states, ready for the output head.
        weight_VD: Output head.
        targets_T: int64 in [0, V), or −100.
        chunk: Tokens per piece.

    Returns:
        The sum (not the mean), a float32 scalar; float64 for float64 inputs.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    if x_TD.dim() != 2 or weight_VD.dim() != 2 or x_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: want x [T, D] and weight [V, D], got {list(x_TD.shape)} and {list(weight_VD.shape)}"
        )
    if targets_T.shape != x_TD.shape[:1] or targets_T.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: targets must be int64 [{x_TD.shape[0]}], "
            f"got {targets_T.dtype} {list(targets_T.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk must be at least 1, got {chunk}")
    return implementation("linear_cross_entropy", x_TD)(x_TD, weight_VD, targets_T, chunk)
