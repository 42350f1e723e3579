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

from nautile.ops import fp8_recipe as recipe
from nautile.ops.fp8_linear_nodes import grouped_linear_node, linear_node
from nautile.ops.fp8_products import BLOCK_K, ROWS, SQUARES
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.group_layout import ALIGNMENT, check_alignment, rows_of
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
    x_RD = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        ys = tuple(linear_node(x_RD, weight_OD, dtype)[0] for weight_OD in weights_OD)
    else:
        ys = _Linears.apply(x_RD, dtype, *weights_OD)
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
    dtype = _dtype("fp8_grouped_linear", x_RD)
    if torch.compiler.is_compiling():
        return grouped_linear_node(x_RD, weight_GOD, ends_G, alignment, dtype)[0]
    return _GroupedLinear.apply(x_RD, weight_GOD, ends_G, alignment, dtype)


def _dtype(op: str, x: Tensor) -> torch.dtype:
    dtype = compute_dtype(x)
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{op}: x must be bfloat16 or float32, or autocast to one of them, got {dtype}")
    return dtype


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, dtype: torch.dtype, *weights_OD: Tensor) -> tuple[Tensor, ...]:
        with no_autocast(x_RD):
            x, weights = recipe.activation(x_RD.to(dtype)), [recipe.weight(w) for w in weights_OD]
            ys = tuple(recipe.product(x, w, dtype) for w in weights)
        ctx.save_for_backward(x.data, x.scale, *(t for w in weights for t in (w.data, w.scale)))
        ctx.meta = x_RD.dtype, x_RD.shape[1], dtype, [w.dtype for w in weights_OD]
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x_dtype, D, dtype, weight_dtypes = ctx.meta
        x_data, x_scale, *saved = ctx.saved_tensors
        x = Fp8Tensor(x_data, x_scale, ROWS)
        weights = [Fp8Tensor(data, scale, SQUARES) for data, scale in zip(saved[::2], saved[1::2], strict=True)]
        needs_x, _, *needs_weight = ctx.needs_input_grad
        with no_autocast(x_data):
            found = recipe.gradients([g.to(dtype) for g in grads], x, weights, D, needs_x, needs_weight)
        grad_x, grad_weights = found
        as_given = [None if g is None else g.to(kind) for g, kind in zip(grad_weights, weight_dtypes, strict=True)]
        return None if grad_x is None else grad_x.to(x_dtype), None, *as_given


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weight_GOD: Tensor, ends_G: Tensor, alignment: int, dtype: torch.dtype
    ) -> Tensor:
        groups_R = rows_of(ends_G, len(x_RD), alignment)
        with no_autocast(x_RD):
            x, w = recipe.activation(recipe.cleared(x_RD.to(dtype), groups_R)), recipe.weight(weight_GOD)
            y_RO = recipe.grouped_product(x, w, groups_R, dtype, alignment)
        ctx.save_for_backward(x.data, x.scale, w.data, w.scale, ends_G, groups_R)
        ctx.meta = x_RD.dtype, x_RD.shape[1], dtype, weight_GOD.dtype, alignment
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x_dtype, D, dtype, weight_dtype, alignment = ctx.meta
        x_data, x_scale, w_data, w_scale, ends_G, groups_R = ctx.saved_tensors
        x, w = Fp8Tensor(x_data, x_scale, ROWS), Fp8Tensor(w_data, w_scale, SQUARES)
        layout = ends_G, groups_R, alignment
        with no_autocast(x_data):
            found = recipe.grouped_gradients(grads[0].to(dtype), x, w, D, *layout, *ctx.needs_input_grad[:2])
        grad_x, grad_w = found
        return (
            None if grad_x is None else grad_x.to(x_dtype),
            None if grad_w is None else grad_w.to(weight_dtype),
            None,
            None,
            None,
        )
