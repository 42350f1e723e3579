"""Routed experts: tokens sorted by expert once, then plain matrix products per expert into shared buffers."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nautile.ops.cpu.activation import swiglu_backward
from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.precision import compute_dtype, no_autocast

__all__ = ["grouped_swiglu", "why_not"]


def grouped_swiglu(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """See `nautile.ops.grouped_swiglu`."""
    return _GroupedSwiglu.apply(x_TD, gate_up_E2FD, down_EDF, experts_TK, weights_TK, compute_dtype(x_TD))


def _sort_by_expert(experts_TK: Tensor, E: int) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """Order of the T·K choices by expert, its inverse [T, K], and (expert, first, last + 1 row) where there are any."""
    flat = experts_TK.reshape(-1)
    order_R = torch.argsort(flat, stable=True)
    place_TK = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(flat.numel())).view(experts_TK.shape)
    ends = torch.bincount(flat, minlength=E).cumsum(0).tolist()
    spans = [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]
    return order_R, place_TK, spans


def _combine(rows_RD: Tensor, place_TK: Tensor) -> Tensor:
    """Sum of the K rows of each token, [T, D]: one pass, no scatter."""
    return F.embedding_bag(place_TK, rows_RD, mode="sum")


class _GroupedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        E, D, _ = down_EDF.shape
        ctx.dtypes = x_TD.dtype, gate_up_E2FD.dtype, down_EDF.dtype, weights_TK.dtype
        with no_autocast(x_TD):
            x, gate_up, down = x_TD.to(dtype), gate_up_E2FD.to(dtype), down_EDF.to(dtype)
            order_R, place_TK, spans = _sort_by_expert(experts_TK, E)
            token_R = order_R.div(experts_TK.shape[1], rounding_mode="floor")
            weight_R1 = weights_TK.to(dtype).reshape(-1, 1).index_select(0, order_R)
            hidden_R2F = x.new_empty(order_R.numel(), gate_up.shape[1])
            out_RD = x.new_empty(order_R.numel(), D)
            for e, a, b in spans:
                torch.mm(x.index_select(0, token_R[a:b]), gate_up[e].t(), out=hidden_R2F[a:b])
                gate, up = hidden_R2F[a:b].chunk(2, dim=1)
                # The routing weight goes in before the narrower side of the down projection.
                torch.mm(F.silu(gate).mul_(up).mul_(weight_R1[a:b]), down[e].t(), out=out_RD[a:b])
            y_TD = _combine(out_RD, place_TK)
        ctx.save_for_backward(x, gate_up, down, token_R, place_TK, weight_R1, hidden_R2F)
        ctx.spans = spans
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, token_R, place_TK, weight_R1, hidden_R2F = ctx.saved_tensors
        x_dtype, gate_up_dtype, down_dtype, weights_dtype = ctx.dtypes
        grad_gate_up = torch.zeros(gate_up.shape, dtype=gate_up_dtype)
        grad_down = torch.zeros(down.shape, dtype=down_dtype)
        grad_weight_R = torch.empty(token_R.numel(), dtype=weights_dtype)
        grad_rows_RD = x.new_empty(token_R.numel(), x.shape[1])
        with no_autocast(x):
            grad_TD = grad_TD.to(x.dtype)
            for e, a, b in ctx.spans:
                token, weight = token_R[a:b], weight_R1[a:b]
                gate, up = hidden_R2F[a:b].chunk(2, dim=1)
                silu, grad_out = F.silu(gate), grad_TD.index_select(0, token)
                act = silu * up
                grad_act = torch.mm(grad_out, down[e])
                grad_weight_R[a:b] = torch.linalg.vecdot(grad_act, act)
                grad_down[e] = torch.mm(grad_out.t(), act.mul_(weight))
                grad_hidden = torch.cat(swiglu_backward(grad_act.mul_(weight), gate, up, silu), dim=1)
                grad_gate_up[e] = torch.mm(grad_hidden.t(), x.index_select(0, token))
                torch.mm(grad_hidden, gate_up[e], out=grad_rows_RD[a:b])
            grad_x = _combine(grad_rows_RD, place_TK).to(x_dtype)
        grad_weights = grad_weight_R.index_select(0, place_TK.flatten()).view_as(place_TK)
        return grad_x, grad_gate_up, grad_down, None, grad_weights, None
