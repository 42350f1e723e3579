"""Matrix products with a layer's weights: the plain projection, and the gated pair in front of a SwiGLU."""

from torch import Tensor

from nautile.ops.dispatch import implementation


def linear(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``, [..., D] → [..., O], in the compute dtype; differentiable in all three.

    Raises:
        ValueError: Shapes do not fit together.
    """
    _check("linear", x, weight_OD)
    if bias_O is not None and bias_O.shape != weight_OD.shape[:1]:
        raise ValueError(f"linear: bias must be [{weight_OD.shape[0]}], got {list(bias_O.shape)}")
    return implementation("linear", x)(x, weight_OD, bias_O)


def gated_linear(x: Tensor, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """``silu(x W_gateᵀ) ⊙ (x W_upᵀ)``, [..., D] → [..., F]: SwiGLU (arXiv 2002.05202) before its last projection.

    In the compute dtype; differentiable in all three.

    Raises:
        ValueError: Shapes do not fit together.
    """
    _check("gated_linear", x, gate_FD)
    if up_FD.shape != gate_FD.shape:
        raise ValueError(f"gated_linear: gate {list(gate_FD.shape)} and up {list(up_FD.shape)} must agree")
    return implementation("gated_linear", x)(x, gate_FD, up_FD)


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: want x [..., D] and weights [O, D], got {list(x.shape)} and {list(weight.shape)}")
