"""SwiGLU that gives FP8, for a down projection that multiplies FP8: what lies between is never written.

    y_tf = w_t · silu(g_tf) · u_tf,   (g_t, u_t) the two halves of a row

DeepSeek-V3 caches the inputs of SwiGLU and computes its output again in the backward (arXiv 2412.19437, §3.5.2), which
needs yᵀ there, in blocks along the tokens, and the gradient of (g, u) twice: in blocks along the features for the
gradient of the tokens, along the tokens for the gradient of the weights.

T tokens, F features; all arithmetic in float32, all blocks (1, 128), and F is a multiple of 128, so that no block has
numbers of both halves. None of this has a gradient of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nautile.ops.checks import same_device
from nautile.ops.dispatch import implementation
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.quantization import FLOATS, check_finite

BLOCK = (1, 128)


@dataclass(frozen=True)
class SwigluGradients:
    """Gradients of one `swiglu_quantize`."""

    rows: Fp8Tensor
    """[T, 2F]: of (g, u), in blocks along the features."""
    columns: Fp8Tensor
    """[2F, T]: the same, in blocks along the tokens."""
    weight_T: Tensor | None
    """float32: of the weights, where there are some."""


def swiglu_quantize(
    gate_up_T2F: Tensor, weight_T: Tensor | None = None, ue8m0: bool = False, transpose: bool = False
) -> Fp8Tensor:
    """``w · silu(gate) ⊙ up`` in FP8.

    Args:
        gate_up_T2F: float32, bfloat16 or float16: F gates, then F ups, per token.
        weight_T: float32 factor of each token, a routing weight.
        ue8m0: Scales are powers of two.
        transpose: yᵀ, with a scale for 128 tokens.

    Returns:
        [T, F], or [F, T] with `transpose`.

    Raises:
        ValueError: Shapes or dtypes do not fit; F is no multiple of 128; NaN or infinity, looked for where that is
            cheap.
    """
    _check("swiglu_quantize", gate_up_T2F, weight_T)
    gate_up_T2F, weight_T = gate_up_T2F.detach(), None if weight_T is None else weight_T.detach()
    data, scale = implementation("swiglu_quantize", gate_up_T2F)(gate_up_T2F, weight_T, ue8m0, transpose)
    return Fp8Tensor(data, scale, BLOCK)


def swiglu_quantize_backward(
    grad_TF: Tensor, gate_up_T2F: Tensor, weight_T: Tensor | None = None, ue8m0: bool = False
) -> SwigluGradients:
    """What a gradient of y is for gates, ups and weights.

        dg = w · dy ⊙ u ⊙ σ(g) (1 + g (1 − σ(g))),   du = w · dy ⊙ silu(g),   dw_t = Σ_f dy_tf · silu(g_tf) · u_tf

    Args:
        grad_TF: float32, bfloat16 or float16: dy.
        gate_up_T2F: As in `swiglu_quantize`.
        weight_T: As there.
        ue8m0: Scales are powers of two.

    Raises:
        ValueError: As there; `grad_TF` has not the shape of y.
    """
    _check("swiglu_quantize_backward", gate_up_T2F, weight_T)
    want = [gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2]
    if list(grad_TF.shape) != want or grad_TF.dtype not in FLOATS:
        raise ValueError(
            f"swiglu_quantize_backward: grad must be {want} of float32, bfloat16 or float16, "
            f"got {grad_TF.dtype} {list(grad_TF.shape)}"
        )
    same_device("swiglu_quantize_backward", grad=grad_TF, gate_up=gate_up_T2F)
    check_finite("swiglu_quantize_backward", grad_TF, "grad")
    run = implementation("swiglu_quantize_backward", gate_up_T2F)
    with torch.no_grad():
        (rows, row_scale), (columns, column_scale), grad_weight_T = run(grad_TF, gate_up_T2F, weight_T, ue8m0)
    return SwigluGradients(Fp8Tensor(rows, row_scale, BLOCK), Fp8Tensor(columns, column_scale, BLOCK), grad_weight_T)


def _check(op: str, gate_up_T2F: Tensor, weight_T: Tensor | None) -> None:
    if gate_up_T2F.dim() != 2 or gate_up_T2F.shape[1] % 256 or gate_up_T2F.dtype not in FLOATS:
        raise ValueError(
            f"{op}: gate_up must be [T, 2F] of float32, bfloat16 or float16 with F a multiple of 128, "
            f"got {gate_up_T2F.dtype} {list(gate_up_T2F.shape)}"
        )
    if weight_T is not None and (weight_T.dtype != torch.float32 or weight_T.shape != gate_up_T2F.shape[:1]):
        raise ValueError(
            f"{op}: weight must be float32 [{gate_up_T2F.shape[0]}], got {weight_T.dtype} {list(weight_T.shape)}"
        )
    same_device(op, gate_up=gate_up_T2F, weight=weight_T)
    check_finite(op, gate_up_T2F, "gate_up")
