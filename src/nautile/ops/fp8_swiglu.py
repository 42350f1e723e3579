"""SwiGLU that keeps its inputs for the backward pass in FP8: a byte per number instead of two (DeepSeek-V3, §3.3.3).

    y = silu(g) ⊙ u,   dg = dy ⊙ û ⊙ silu'(ĝ),   du = dy ⊙ silu(ĝ)

ĝ and û are quantised in tiles of 1 × 128 with powers of two as scales; y itself is computed from g and u.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nautile.ops.activation import swiglu
from nautile.ops.dispatch import implementation
from nautile.ops.fp8_products import ROWS
from nautile.ops.fp8_tensor import Fp8Tensor


def fp8_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) ⊙ up`` of bfloat16 or float32 [..., F], in their dtype; differentiable in both.

    Under torch.compile, which chooses itself what to keep, the plain one.

    Raises:
        ValueError: Shapes or dtypes of the two differ, or the dtype is another one.
    """
    if gate.shape != up.shape or gate.dim() < 1 or gate.dtype != up.dtype:
        raise ValueError(
            f"fp8_swiglu: gate {gate.dtype} {list(gate.shape)} and up {up.dtype} {list(up.shape)} must agree"
        )
    if gate.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"fp8_swiglu: gate must be bfloat16 or float32, got {gate.dtype}")
    if torch.compiler.is_compiling():
        return swiglu(gate, up)
    return _Swiglu.apply(gate, up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        kept = [_quantized(x) for x in (gate, up)]
        ctx.save_for_backward(*(t for x in kept for t in (x.data, x.scale)))
        ctx.shape = gate.shape
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        gate_data, gate_scale, up_data, up_scale = ctx.saved_tensors
        grad = grads[0]
        gate, up = (
            _numbers(Fp8Tensor(data, scale, ROWS)).view(ctx.shape)
            for data, scale in ((gate_data, gate_scale), (up_data, up_scale))
        )
        wide = grad.float()
        grad_gate = torch.ops.aten.silu_backward(wide * up, gate)
        return grad_gate.to(grad.dtype), (wide * F.silu(gate)).to(grad.dtype)


def _quantized(x: Tensor) -> Fp8Tensor:
    """Not checked for NaN and infinity, which stay what they are."""
    x_RF = x.reshape(-1, x.shape[-1])
    data, scale = implementation("quantize_fp8", x_RF)(x_RF, ROWS, True)
    return Fp8Tensor(data, scale, ROWS)


def _numbers(x: Fp8Tensor) -> Tensor:
    return implementation("dequantize_fp8", x.data)(x, torch.float32)
