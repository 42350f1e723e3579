"""The gated activation of every feed-forward layer here."""

from torch import Tensor

from nautile.ops.dispatch import implementation


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """``silu(gate) ⊙ up`` (arXiv 2002.05202, without the projections), for any number of leading dimensions.

    Computed in float32 or better, returned in the dtype of `gate`. Differentiable in both.

    Raises:
        ValueError: The two differ in shape or dtype.
    """
    if gate_TF.shape != up_TF.shape or gate_TF.dtype != up_TF.dtype:
        raise ValueError(
            "swiglu: gate and up must agree, got "
            f"{gate_TF.dtype} {list(gate_TF.shape)} and {up_TF.dtype} {list(up_TF.shape)}"
        )
    return implementation("swiglu", gate_TF)(gate_TF, up_TF)
