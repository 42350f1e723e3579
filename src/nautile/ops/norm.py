"""Root-mean-square normalisation."""

from torch import Tensor

from nautile.ops.dispatch import implementation


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) ⊙ weight`` over the last dimension (arXiv 1910.07467).

    Computed in float32 or better whatever the input. The result has the compute dtype (the autocast dtype under
    autocast, else the dtype of x): what follows a norm here is a projection, which would round it anyway, and one
    rounding per norm is cheaper than one per projection.

    Raises:
        ValueError: `weight` is not a vector as long as the last dimension of `x`.
    """
    if weight.dim() != 1 or x.dim() < 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"rms_norm: weight must be [{x.shape[-1] if x.dim() else '?'}], got {list(weight.shape)}")
    return implementation("rms_norm", x)(x, weight, eps)
