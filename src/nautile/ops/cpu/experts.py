"""Routed experts: tokens sorted by expert once, then plain matrix products per expert into shared buffers.

An expert's rows are filled up to a multiple of a granule with rows of weight zero. Loads change with every step, and
oneDNN compiles a kernel for every new shape: without the granule that costs more than half of the products' own time.

A few tokens without a gradient, as in decoding, run in C++: their time is that of reading the weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nautile.ops.cpu import expert_decode, onednn
from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.cpu.support import needs_gradient
from nautile.ops.precision import compute_dtype, no_autocast

__all__ = ["grouped_swiglu", "why_not"]


def grouped_swiglu(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """See `nautile.ops.grouped_swiglu`."""
    dtype = compute_dtype(x_TD)
    if needs_gradient(x_TD, gate_up_E2FD, down_EDF, weights_TK):
        return _GroupedSwiglu.apply(x_TD, gate_up_E2FD, down_EDF, experts_TK, weights_TK, dtype)
    if dtype == x_TD.dtype and expert_decode.takes(x_TD, gate_up_E2FD, down_EDF, experts_TK):
        return expert_decode.mixture(x_TD, gate_up_E2FD, down_EDF, experts_TK, weights_TK)
    with no_autocast(x_TD):
        return _mixture(x_TD.to(dtype), gate_up_E2FD.to(dtype), down_EDF.to(dtype), experts_TK, weights_TK.to(dtype))


def _mixture(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The mixture of which nothing is kept; routing weights go in with the sum over a token's experts."""
    E, D, F_ = down_EDF.shape
    layout = _Layout.of(experts_TK, E)
    hidden_R2F = x_TD.new_empty(layout.token_R.numel(), 2 * F_)
    out_RD = x_TD.new_empty(layout.token_R.numel(), D)
    # In bfloat16 torch asks oneDNN itself, and one product of both halves beats two that spare a pass.
    fused = x_TD.dtype == torch.float32 and onednn.suits(x_TD, gate_up_E2FD, down_EDF)
    for e, a, b in layout.spans:
        x = x_TD.index_select(0, layout.token_R[a:b])
        if fused:
            out_RD[a:b] = onednn.product(onednn.gated_product(x, *gate_up_E2FD[e].split(F_)), down_EDF[e])
        else:
            gate, up = torch.mm(x, gate_up_E2FD[e].t(), out=hidden_R2F[a:b]).split(F_, dim=1)
            torch.mm(F.silu(gate).mul_(up), down_EDF[e].t(), out=out_RD[a:b])
    return F.embedding_bag(layout.place_TK, out_RD, mode="sum", per_sample_weights=weights_TK)


@dataclass(frozen=True)
class _Layout:
    """Where the T·K choices lie among R rows ordered by expert."""

    place_TK: Tensor
    """Row of each choice."""
    token_R: Tensor
    """Token of each row; 0 in the rows that only fill up."""
    spans: list[tuple[int, int, int]]
    """(expert, first row, last row + 1) of every expert that has rows."""

    @classmethod
    def of(cls, experts_TK: Tensor, E: int) -> "_Layout":
        choice = experts_TK.reshape(-1)
        counts = torch.bincount(choice, minlength=E)
        granule = _granule(choice.numel(), E)
        filled = (counts + (granule - 1)).div_(granule, rounding_mode="floor").mul_(granule)
        ends = filled.cumsum(0)
        order = torch.argsort(choice, stable=True)
        # The j-th choice in order of experts moves down by all the filling before its expert.
        shift = (ends - filled) - (counts.cumsum(0) - counts)
        row = torch.arange(choice.numel()).add_(shift.index_select(0, choice.index_select(0, order)))
        place = torch.empty_like(choice).scatter_(0, order, row)
        bounds = [0, *ends.tolist()]
        token = choice.new_zeros(bounds[-1]).scatter_(0, row, order.div(experts_TK.shape[1], rounding_mode="floor"))
        spans = [(e, bounds[e], bounds[e + 1]) for e in range(E) if bounds[e + 1] > bounds[e]]
        return cls(place.view(experts_TK.shape), token, spans)

    def to_rows(self, values_TK: Tensor) -> Tensor:
        """[R, 1]: the value of each row's choice; zero in the rows that only fill up."""
        rows = values_TK.new_zeros(self.token_R.numel())
        return rows.scatter_(0, self.place_TK.flatten(), values_TK.flatten()).unsqueeze(1)

    def to_choices(self, values_R: Tensor) -> Tensor:
        """[T, K]: the value of each choice's row."""
        return values_R.index_select(0, self.place_TK.flatten()).view(self.place_TK.shape)

    def sum_per_token(self, rows_RD: Tensor) -> Tensor:
        """[T, D]: sum of the K rows of each token, in one pass without a scatter."""
        return F.embedding_bag(self.place_TK, rows_RD, mode="sum")


def _granule(choices: int, E: int) -> int:
    """A power of two near 1/16 of the mean load: a few dozen shapes in all, and about 3 % more rows."""
    return 1 << max(0, (choices // (16 * E)).bit_length() - 1)


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
        with no_autocast(x_TD):
            x, gate_up, down = x_TD.to(dtype), gate_up_E2FD.to(dtype), down_EDF.to(dtype)
            layout = _Layout.of(experts_TK, E)
            weight_R1 = layout.to_rows(weights_TK.to(dtype))
            hidden_R2F = x.new_empty(layout.token_R.numel(), gate_up.shape[1])
            out_RD = x.new_empty(layout.token_R.numel(), D)
            for e, a, b in layout.spans:
                torch.mm(x.index_select(0, layout.token_R[a:b]), gate_up[e].t(), out=hidden_R2F[a:b])
                gate, up = hidden_R2F[a:b].chunk(2, dim=1)
                # The routing weight goes in before the down projection: F columns are fewer than D.
                torch.mm(F.silu(gate).mul_(up).mul_(weight_R1[a:b]), down[e].t(), out=out_RD[a:b])
            y_TD = layout.sum_per_token(out_RD)
        ctx.save_for_backward(x, gate_up, down, weight_R1, hidden_R2F)
        ctx.layout = layout
        ctx.dtypes = x_TD.dtype, gate_up_E2FD.dtype, down_EDF.dtype, weights_TK.dtype
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Per expert, with a = silu(g) ⊙ u: dw = a·da', da = w da', da' = dy W_down; silu(g) is computed again."""
        x, gate_up, down, weight_R1, hidden_R2F = ctx.saved_tensors
        layout: _Layout = ctx.layout
        x_dtype, gate_up_dtype, down_dtype, weights_dtype = ctx.dtypes
        R, F_ = hidden_R2F.shape[0], down.shape[2]
        grad_gate_up = torch.empty(gate_up.shape, dtype=gate_up_dtype)
        grad_down = torch.empty(down.shape, dtype=down_dtype)
        for e in set(range(down.shape[0])).difference(e for e, _, _ in layout.spans):
            grad_gate_up[e].zero_()
            grad_down[e].zero_()
        grad_weight_R = torch.empty(R, dtype=weights_dtype)
        grad_rows_RD = x.new_empty(R, x.shape[1])
        with no_autocast(x):
            grad_TD = grad_TD.to(x.dtype)
            for e, a, b in layout.spans:
                token, weight = layout.token_R[a:b], weight_R1[a:b]
                gate, up = hidden_R2F[a:b].chunk(2, dim=1)
                grad_out, silu = grad_TD.index_select(0, token), F.silu(gate)
                act, grad_act = silu * up, torch.mm(grad_out, down[e])
                grad_weight_R[a:b] = torch.linalg.vecdot(grad_act, act)
                _product_into(grad_down[e], grad_out.t(), act.mul_(weight))
                grad_hidden = x.new_empty(b - a, 2 * F_)
                grad_gate, grad_up = grad_hidden.chunk(2, dim=1)
                torch.mul(grad_act.mul_(weight), silu, out=grad_up)
                torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=grad_gate)
                _product_into(grad_gate_up[e], grad_hidden.t(), x.index_select(0, token))
                torch.mm(grad_hidden, gate_up[e], out=grad_rows_RD[a:b])
            grad_x = layout.sum_per_token(grad_rows_RD).to(x_dtype)
        return grad_x, grad_gate_up, grad_down, None, layout.to_choices(grad_weight_R), None


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b, written once where the dtypes agree: pages of a gradient that is new are slow enough to touch."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))
