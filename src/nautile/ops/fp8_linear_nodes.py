"""Projections in FP8 as nodes of a compiler's graph, which run what eager calls do.

Traced instead, their quantisation would be inlined, and looking for the fastest way to widen FP8 would break the graph.
Weights are quantised again in the backward pass, which keeps a node's outputs to what it must remember.

R rows, D inputs, O outputs, G groups.
"""

from typing import Any

import torch
from torch import Tensor

from nautile.ops import fp8_recipe as recipe
from nautile.ops.fp8_products import ROWS
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.group_layout import aligned, rows_of


@torch.library.custom_op("nautile::fp8_linear", mutates_args=())
def linear_node(x_RD: Tensor, weight_OD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Result, and x̂ with its scales for the backward pass."""
    x = recipe.activation(x_RD.to(dtype))
    return recipe.product(x, recipe.weight(weight_OD), dtype), x.data, x.scale


@torch.library.custom_op("nautile::fp8_linear_backward", mutates_args=())
def linear_backward_node(
    grad_RO: Tensor, x_data: Tensor, x_scale: Tensor, weight_OD: Tensor, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of both factors."""
    w = recipe.weight(weight_OD)
    x = Fp8Tensor(x_data, x_scale, ROWS)
    grad_x, (grad_w,) = recipe.gradients([grad_RO], x, [w], weight_OD.shape[1], True, [True])
    assert grad_x is not None and grad_w is not None
    return grad_x.to(x_dtype), grad_w.to(weight_OD.dtype)


@linear_node.register_fake
def _(x_RD: Tensor, weight_OD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    (R, D), O = x_RD.shape, weight_OD.shape[0]  # noqa: E741
    return x_RD.new_empty(R, O, dtype=dtype), *_kept(x_RD, R, D)


@linear_backward_node.register_fake
def _(grad_RO: Tensor, x_data: Tensor, x_scale: Tensor, weight_OD: Tensor, x_dtype: torch.dtype):
    return grad_RO.new_empty(grad_RO.shape[0], weight_OD.shape[1], dtype=x_dtype), torch.empty_like(weight_OD)


@torch.library.custom_op("nautile::fp8_grouped_linear", mutates_args=())
def grouped_linear_node(
    x_RD: Tensor, weight_GOD: Tensor, ends_G: Tensor, alignment: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, and x̂ with its scales for the backward pass."""
    groups_R = rows_of(ends_G, len(x_RD), alignment)
    x = recipe.activation(recipe.cleared(x_RD.to(dtype), groups_R))
    return recipe.grouped_product(x, recipe.weight(weight_GOD), groups_R, dtype, alignment), x.data, x.scale


@torch.library.custom_op("nautile::fp8_grouped_linear_backward", mutates_args=())
def grouped_linear_backward_node(
    grad_RO: Tensor,
    x_data: Tensor,
    x_scale: Tensor,
    weight_GOD: Tensor,
    ends_G: Tensor,
    alignment: int,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of both factors."""
    x, w, D = Fp8Tensor(x_data, x_scale, ROWS), recipe.weight(weight_GOD), weight_GOD.shape[2]
    groups_R = rows_of(ends_G, len(grad_RO), alignment)
    grad_x, grad_w = recipe.grouped_gradients(grad_RO, x, w, D, ends_G, groups_R, alignment, True, True)
    assert grad_x is not None and grad_w is not None
    return grad_x.to(x_dtype), grad_w.to(weight_GOD.dtype)


@grouped_linear_node.register_fake
def _(x_RD: Tensor, weight_GOD: Tensor, ends_G: Tensor, alignment: int, dtype: torch.dtype):
    (R, D), O = x_RD.shape, weight_GOD.shape[1]  # noqa: E741
    return x_RD.new_empty(R, O, dtype=dtype), *_kept(x_RD, R, D)


@grouped_linear_backward_node.register_fake
def _(
    grad_RO: Tensor,
    x_data: Tensor,
    x_scale: Tensor,
    weight_GOD: Tensor,
    ends_G: Tensor,
    alignment: int,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return grad_RO.new_empty(grad_RO.shape[0], weight_GOD.shape[2], dtype=x_dtype), torch.empty_like(weight_GOD)


def _kept(x_RD: Tensor, R: int, D: int) -> tuple[Tensor, Tensor]:
    columns = aligned(D, ROWS[1])
    data = x_RD.new_empty(R, columns, dtype=torch.float8_e4m3fn)
    return data, x_RD.new_empty(R, columns // ROWS[1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x_RD, weight, dtype = inputs
    ctx.save_for_backward(output[1], output[2], weight)
    ctx.meta = x_RD.dtype, dtype
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad_RO: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x_dtype, dtype = ctx.meta
    return *linear_backward_node(grad_RO.to(dtype), *ctx.saved_tensors, x_dtype), None


def _keep_grouped(ctx: Any, inputs: tuple, output: tuple) -> None:
    x_RD, weight, ends_G, alignment, dtype = inputs
    ctx.save_for_backward(output[1], output[2], weight, ends_G)
    ctx.meta = x_RD.dtype, alignment, dtype
    ctx.mark_non_differentiable(output[1], output[2])


def _grouped_backward(ctx: Any, grad_RO: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x_dtype, alignment, dtype = ctx.meta
    x_data, x_scale, weight, ends_G = ctx.saved_tensors
    node = grouped_linear_backward_node(grad_RO.to(dtype), x_data, x_scale, weight, ends_G, alignment, x_dtype)
    return *node, None, None, None


linear_node.register_autograd(_backward, setup_context=_keep)
grouped_linear_node.register_autograd(_grouped_backward, setup_context=_keep_grouped)
