"""Specification of SwiGLU that gives FP8: its formula in float32, then the quantiser."""

import torch
from torch import Tensor

from nautile.ops.reference.quantization import quantize_fp8, why_not

__all__ = ["swiglu_quantize", "swiglu_quantize_backward", "why_not"]

Quantized = tuple[Tensor, Tensor]
BLOCK = (1, 128)


def swiglu_quantize(gate_up_T2F: Tensor, weight_T: Tensor | None, ue8m0: bool, transpose: bool) -> Quantized:
    """(data, scale); see `nautile.ops.swiglu_quantize`."""
    gate_TF, up_TF = gate_up_T2F.float().chunk(2, dim=-1)
    y_TF = gate_TF * gate_TF.sigmoid() * up_TF
    if weight_T is not None:
        y_TF = y_TF * weight_T[:, None]
    return quantize_fp8(y_TF.t() if transpose else y_TF, BLOCK, ue8m0)


def swiglu_quantize_backward(
    grad_TF: Tensor, gate_up_T2F: Tensor, weight_T: Tensor | None, ue8m0: bool
) -> tuple[Quantized, Quantized, Tensor | None]:
    """Rows, columns, gradient of the weights; see `nautile.ops.swiglu_quantize_backward`."""
    (gate_TF, up_TF), dy_TF = gate_up_T2F.float().chunk(2, dim=-1), grad_TF.float()
    sigmoid_TF = gate_TF.sigmoid()
    silu_TF = gate_TF * sigmoid_TF
    dweight_T = None
    if weight_T is not None:
        dweight_T = (dy_TF * silu_TF * up_TF).sum(-1)
        dy_TF = dy_TF * weight_T[:, None]
    dgate_TF = dy_TF * up_TF * (sigmoid_TF * (1 + gate_TF * (1 - sigmoid_TF)))
    d_T2F = torch.cat([dgate_TF, dy_TF * silu_TF], dim=-1)
    return quantize_fp8(d_T2F, BLOCK, ue8m0), quantize_fp8(d_T2F.t(), BLOCK, ue8m0), dweight_T
