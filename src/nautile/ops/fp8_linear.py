"""Projections whose three products run in FP8: the training recipe of DeepSeek-V3 (arXiv 2412.19437, §3.3).

    y = x̂ Ŵᵀ,   dx = dŷ Ŵ,   dW = dỹᵀ x̃

x̂ and dŷ are quantised in tiles of 1 × 128 along the axis that the product sums over, Ŵ in blocks of 128 × 128; the last
product sums over tokens, so x̃ and dỹ have tiles of 128 × 1. x̂ alone is kept for the backward pass, a byte per number,
and x̃ is made from it. Its scales are powers of two, so that this second rounding changes a number only where it falls
below the smallest normal one of its new tile. Everything is e4m3, products are accumulated in float32, gradients of
weights leave in their own dtype (float32 master weights).

Sizes need not be multiples of 128: the last block of a row is filled with zeros, which add nothing. NaN and infinity
are passed on, to whoever watches the loss or the gradient's norm.

R rows (tokens), D inputs, O outputs, G groups (experts).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nautile.ops.dispatch import implementation
from nautile.ops.fp8_products import BLOCK_K, ROWS, SQUARES
from nautile.ops.fp8_tensor import Block, Fp8Tensor
from nautile.ops.group_layout import ALIGNMENT, aligned, check_alignment, rows_of
from nautile.ops.precision import compute_dtype, no_autocast


def fp8_linear(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` in FP8, [..., D] → [..., O], in the compute dtype; differentiable in all three.

    Raises:
        ValueError: Shapes do not fit together, or the dtype is neither bfloat16 nor float32.
    """
    (y,) = fp8_linears(x, weight_OD)
    return y if bias_O is None else y + bias_O.to(y.dtype)


def fp8_linears(x: Tensor, *weights_OD: Tensor) -> tuple[Tensor, ...]:
    """`fp8_linear` of one input with several weights, which quantises the input once."""
    for weight_OD in weights_OD:
        if x.dim() < 1 or weight_OD.dim() != 2 or weight_OD.shape[1] != x.shape[-1]:
            raise ValueError(
                f"fp8_linear: want x [..., D] and weights [O, D], got {list(x.shape)} and {list(weight_OD.shape)}"
            )
    dtype = _dtype("fp8_linear", x)
    ys = _Linears.apply(x.reshape(-1, x.shape[-1]), dtype, *weights_OD)
    return tuple(y_RO.view(*x.shape[:-1], y_RO.shape[1]) for y_RO in ys)


def fp8_grouped_linear(x_RD: Tensor, weight_GOD: Tensor, ends_G: Tensor, alignment: int = ALIGNMENT) -> Tensor:
    """Each group's rows times its own weight in FP8: ``y_r = W_g x_r``; differentiable in both.

    Args:
        x_RD: Rows in aligned segments (`group_layout`); padding rows may hold anything.
        weight_GOD: [G, O, D].
        ends_G: int32: where each group's rows end.
        alignment: Every group begins at a multiple of so many rows, itself a multiple of 128: in the weights' gradient
            rows share scales 128 by 128.

    Returns:
        y_RO in the compute dtype; 0 in padding rows. Padding rows get zero gradients, groups without rows, too.

    Raises:
        ValueError: Shapes, dtypes or the layout do not fit together.
    """
    if x_RD.dim() != 2 or weight_GOD.dim() != 3 or weight_GOD.shape[2] != x_RD.shape[1]:
        raise ValueError(
            "fp8_grouped_linear: want x [R, D] and weights [G, O, D], got "
            f"{list(x_RD.shape)} and {list(weight_GOD.shape)}"
        )
    if ends_G.dtype != torch.int32 or list(ends_G.shape) != [len(weight_GOD)]:
        raise ValueError(
            f"fp8_grouped_linear: ends must be int32 [{len(weight_GOD)}], got {ends_G.dtype} {list(ends_G.shape)}"
        )
    check_alignment("fp8_grouped_linear", alignment, BLOCK_K)
    return _GroupedLinear.apply(x_RD, weight_GOD, ends_G, alignment, _dtype("fp8_grouped_linear", x_RD))


def _dtype(op: str, x: Tensor) -> torch.dtype:
    dtype = compute_dtype(x)
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{op}: x must be bfloat16 or float32, or autocast to one of them, got {dtype}")
    return dtype


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, dtype: torch.dtype, *weights_OD: Tensor) -> tuple[Tensor, ...]:
        with no_autocast(x_RD):
            x, weights = activation(x_RD.to(dtype)), [weight(w) for w in weights_OD]
            ys = tuple(_product(x, w, dtype) for w in weights)
        ctx.save_for_backward(x.data, x.scale, *(t for w in weights for t in (w.data, w.scale)))
        ctx.meta = x_RD.dtype, x_RD.shape[1], dtype, [w.dtype for w in weights_OD]
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x_dtype, D, dtype, weight_dtypes = ctx.meta
        x_data, x_scale, *saved = ctx.saved_tensors
        needs_x, _, *needs_weight = ctx.needs_input_grad
        grad_x: Tensor | None = None
        grad_weights: list[Tensor | None] = [None] * len(grads)
        with no_autocast(x_data):
            x = turned_activation(Fp8Tensor(x_data, x_scale, ROWS), D) if any(needs_weight) else None
            for i, grad_RO in enumerate(grads):
                grad_RO, unit = lifted(grad_RO.to(dtype))
                if needs_x:
                    w = turned_weight(Fp8Tensor(saved[2 * i], saved[2 * i + 1], SQUARES), D)
                    grad_x = _product(gradient(grad_RO, unit), w, dtype, grad_x)
                if needs_weight[i] and x is not None:
                    grad_w = _product(turned_gradient(grad_RO, unit), x, torch.float32)
                    grad_weights[i] = grad_w.to(weight_dtypes[i])
        return (None if grad_x is None else grad_x.to(x_dtype), None, *grad_weights)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weight_GOD: Tensor, ends_G: Tensor, alignment: int, dtype: torch.dtype
    ) -> Tensor:
        groups_R = rows_of(ends_G, len(x_RD), alignment)
        with no_autocast(x_RD):
            x, w = activation(_cleared(x_RD.to(dtype), groups_R)), weight(weight_GOD)
            y_RO = _grouped_product(x, w, groups_R, dtype, alignment)
        ctx.save_for_backward(x.data, x.scale, w.data, w.scale, ends_G, groups_R)
        ctx.meta = x_RD.dtype, x_RD.shape[1], dtype, weight_GOD.dtype, alignment
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x_dtype, D, dtype, weight_dtype, alignment = ctx.meta
        x_data, x_scale, w_data, w_scale, ends_G, groups_R = ctx.saved_tensors
        grad_x = grad_w = None
        with no_autocast(x_data):
            grad_RO, unit = lifted(_cleared(grads[0].to(dtype), groups_R))
            if ctx.needs_input_grad[0]:
                w = turned_weight(Fp8Tensor(w_data, w_scale, SQUARES), D)
                grad_x = _grouped_product(gradient(grad_RO, unit), w, groups_R, dtype, alignment).to(x_dtype)
            if ctx.needs_input_grad[1]:
                x = turned_activation(Fp8Tensor(x_data, x_scale, ROWS), D)
                a = turned_gradient(grad_RO, unit)
                out = x_data.new_empty((len(ends_G), a.shape[0], D), dtype=torch.float32)
                grad_w = implementation("k_grouped_fp8_gemm", a.data)(a, x, ends_G, None, out, alignment)
                grad_w = grad_w.to(weight_dtype)
        return grad_x, grad_w, None, None, None


def activation(x_RD: Tensor) -> Fp8Tensor:
    """x̂, in whole blocks."""
    return _quantized(x_RD, ROWS, ue8m0=True)


def weight(weight_OD: Tensor) -> Fp8Tensor:
    """Ŵ, in whole blocks."""
    return _quantized(weight_OD, SQUARES)


def turned_weight(w: Fp8Tensor, D: int) -> Fp8Tensor:
    """Ŵᵀ [D, O], in whole blocks."""
    return _rows(_whole(w.t()), D)


def turned_activation(x: Fp8Tensor, D: int) -> Fp8Tensor:
    """x̃ᵀ [D, R], in whole blocks."""
    data, scale = implementation("requantize_transposed", x.data)(x, ROWS, True)
    return _rows(_whole(Fp8Tensor(data, scale, ROWS)), D)


def lifted(grad_RO: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient with its largest number brought near 1, and the power of two that undoes it.

    Quantisers do not tell numbers below 10⁻⁴ from zeros: an activation is none, all of a gradient may be, since it is
    divided by the number of tokens in the batch.
    """
    largest = grad_RO.abs().amax() if grad_RO.numel() else grad_RO.new_zeros(())
    _, exponent = torch.frexp(largest.float())
    unit = torch.exp2(exponent.clamp(-100, 100).float())
    return grad_RO * (1 / unit).to(grad_RO.dtype), unit


def gradient(grad_RO: Tensor, unit: Tensor) -> Fp8Tensor:
    """dŷ, in whole blocks, from what `lifted` gives."""
    x = _quantized(grad_RO, ROWS)
    return Fp8Tensor(x.data, x.scale * unit, x.block)


def turned_gradient(grad_RO: Tensor, unit: Tensor) -> Fp8Tensor:
    """dỹᵀ [O, R], in whole blocks; from the gradient itself, which need not be kept, so it is rounded once."""
    return gradient(grad_RO.mT, unit)


def _quantized(x: Tensor, block: Block, ue8m0: bool = False) -> Fp8Tensor:
    data, scale = implementation("quantize_fp8", x)(x.detach(), block, ue8m0)
    return _whole(Fp8Tensor(data, scale, block))


def _whole(x: Fp8Tensor) -> Fp8Tensor:
    """`x` with zeros in the columns that its last block lacks."""
    missing = aligned(x.shape[-1], BLOCK_K) - x.shape[-1]
    if not missing:
        return x
    data = F.pad(x.data.view(torch.uint8), (0, missing)).view(torch.float8_e4m3fn)
    return Fp8Tensor(data, x.scale, x.block)


def _rows(x: Fp8Tensor, count: int) -> Fp8Tensor:
    """The first rows: without those that only fill a block."""
    return Fp8Tensor(x.data[..., :count, :], x.scale[..., : -(-count // x.block[0]), :], x.block)


def _cleared(x_RD: Tensor, groups_R: Tensor) -> Tensor:
    """`x_RD` with zeros in padding rows, whose numbers would otherwise share scales with real ones."""
    return torch.where(groups_R[:, None] >= 0, x_RD, 0)


def _product(a: Fp8Tensor, b: Fp8Tensor, dtype: torch.dtype, c_MN: Tensor | None = None) -> Tensor:
    """``C + A·Bᵀ`` of operands that fit: the checks of `fp8_gemm` would read all scales once more."""
    out = torch.empty((a.shape[0], b.shape[0]), dtype=dtype, device=a.device)
    return implementation("fp8_gemm", a.data)(a, b, c_MN, out)


def _grouped_product(a: Fp8Tensor, b: Fp8Tensor, groups_R: Tensor, dtype: torch.dtype, alignment: int) -> Tensor:
    out = torch.empty((a.shape[0], b.shape[1]), dtype=dtype, device=a.device)
    return implementation("grouped_fp8_gemm", a.data)(a, b, groups_R, out, alignment)
