"""SwiGLU that keeps its two inputs and recomputes silu in the backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nautile.ops.cpu.support import floats_on_cpu as why_not

__all__ = ["swiglu", "swiglu_backward", "why_not"]


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """See `nautile.ops.swiglu`."""
    return _Swiglu.apply(gate_TF, up_TF)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, silu: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up) for the gradient of silu(gate) ⊙ up; `silu` is silu(gate)."""
    return torch.ops.aten.silu_backward(grad * up, gate), grad * silu


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return swiglu_backward(grad, gate, up, F.silu(gate))
