"""Causal attention with the kernels of `flash_forward` and `flash_backward`, under autograd.

Kept for the backward: inputs in the compute dtype, the output, and one logarithm per query and head; probabilities are
computed again. Gradients are written in the dtype of their input. B sequences, S positions, H query heads, G key
heads, Q key, V value.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.precision import compute_dtype
from nautile.ops.triton.flash_backward import dot_of_rows, gradients_of_keys, gradients_of_queries
from nautile.ops.triton.flash_forward import attend_forward
from nautile.ops.triton.support import next_power_of_two

LOG2_E = math.log2(math.e)


class Masks(NamedTuple):
    """What a position may not see of the ones before it; all None: it sees all of them."""

    ids_BS: Tensor | None = None
    """Documents: equal numbers see each other."""
    first_BS: Tensor | None = None
    """int32: the first position of each position's document; blocks of keys before it are skipped."""
    last_BS: Tensor | None = None
    """int32: the last one; blocks of queries after it are skipped."""
    selected_BSS: Tensor | None = None
    """Bytes: 0 where query i does not read key j."""

    @classmethod
    def of_documents(cls, ids_BS: Tensor) -> "Masks":
        """A document's positions need not stand together."""
        ordered_BS, position_BS = ids_BS.sort(dim=1, stable=True)
        S = ids_BS.shape[1]
        starts_BS = torch.ones_like(ordered_BS, dtype=torch.bool)
        starts_BS[:, 1:] = ordered_BS[:, 1:] != ordered_BS[:, :-1]
        ends_BS = starts_BS.roll(-1, 1)
        here_S = torch.arange(S, device=ids_BS.device)
        first_BS = here_S.where(starts_BS, 0).cummax(1).values
        last_BS = here_S.where(ends_BS, S).flip(1).cummin(1).values.flip(1)
        bounds = (torch.empty_like(x).scatter_(1, position_BS, position_BS.gather(1, x)) for x in (first_BS, last_BS))
        return cls(ids_BS.contiguous(), *(x.int() for x in bounds))


class Widths(NamedTuple):
    """Tiles of the head dimensions: the largest power of two in Q, what is left of Q, and V, all filled up."""

    head: int
    tail: int
    value: int

    @classmethod
    def of(cls, Q: int, V: int) -> "Widths":
        head = max(16, 1 << (Q.bit_length() - 1))
        tail = max(16, next_power_of_two(Q - head)) if head < Q else 0
        return cls(head, tail, max(16, next_power_of_two(V)))

    @property
    def total(self) -> int:
        """Numbers of one row of q (or k) and v."""
        return self.head + self.tail + self.value


class Launch(NamedTuple):
    """Tile sizes and how the compiler is to spread them."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


SMALL = Launch(32, 32, 8, 1)
"""For rows of 16-bit numbers of more than a KiB."""


def forward_launch(widths: Widths, element_size: int) -> Launch:
    """Tiles by the bytes of a row of q and v: as many as 227 KiB and 255 registers of a thread hold.

    Float32 has no tensor cores: a thread holds all numbers of the rows and columns that it multiplies, and registers
    run out sooner.
    """
    if element_size > 2:
        return Launch(32 if widths.total <= 128 else 16, 32, 8, 1)
    row = widths.total * element_size
    if row > 1024:
        return SMALL
    return Launch(128 if row <= 768 else 64, 64, 8, 3 if row <= 640 else 2)


def keys_launch(widths: Widths, element_size: int) -> Launch:
    """Two sums of `keys` rows stay in registers for the whole loop over queries."""
    if element_size > 2:
        return Launch(16 if widths.total > 320 else 32, 16 if widths.total <= 128 else 32, 8, 1)
    row = widths.total * element_size
    if row > 1024:
        return Launch(32, 16, 8, 1)
    return Launch(64 if row <= 512 else 32 if row <= 768 else 16, 64, 8, 2)


def queries_launch(widths: Widths, element_size: int) -> Launch:
    """One sum of `queries` rows stays in registers."""
    if element_size > 2:
        return SMALL if widths.total <= 128 else Launch(16, 32, 8, 2)
    row = widths.total * element_size
    return SMALL if row > 1024 else Launch(128 if row <= 640 else 64, 64, 8, 2)


def attend(q_BSHQ: Tensor, k_BSGQ: Tensor, v_BSGV: Tensor, scale: float, masks: Masks) -> Tensor:
    """o_BSHV in the compute dtype. No arguments are checked."""
    return _Flash.apply(q_BSHQ, k_BSGQ, v_BSGV, scale, masks, compute_dtype(q_BSHQ))


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHQ: Tensor,
        k_BSGQ: Tensor,
        v_BSGV: Tensor,
        scale: float,
        masks: Masks,
        dtype: torch.dtype,
    ) -> Tensor:
        B, S, H, Q = q_BSHQ.shape
        V = v_BSGV.shape[3]
        q, k, v = (rows_of(x, dtype) for x in (q_BSHQ, k_BSGQ, v_BSGV))
        out_BSHV, lse_BHS = q.new_empty(B, S, H, V), q.new_empty(B, H, S, dtype=torch.float32)
        widths = Widths.of(Q, V)
        launch = forward_launch(widths, q.element_size())
        if out_BSHV.numel():
            attend_forward[(triton.cdiv(S, launch.queries) * B * H,)](
                q, k, v, masks.ids_BS, masks.first_BS, masks.selected_BSS, out_BSHV, lse_BHS,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], S, H, H // k.shape[2], scale * LOG2_E,
                Q, V, *widths, launch.queries, launch.keys, masks.ids_BS is not None, masks.selected_BSS is not None,
                num_warps=launch.num_warps, num_stages=launch.num_stages,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out_BSHV, lse_BHS, *masks)
        ctx.scale, ctx.dtypes = scale, (q_BSHQ.dtype, k_BSGQ.dtype, v_BSGV.dtype)
        return out_BSHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHV: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out_BSHV, lse_BHS, *saved = ctx.saved_tensors
        masks = Masks(*saved)
        B, S, H, Q = q.shape
        G, V = v.shape[2:]
        dq, dk, dv = (
            torch.empty(x.shape, dtype=dtype, device=x.device) for x, dtype in zip((q, k, v), ctx.dtypes, strict=True)
        )
        if not out_BSHV.numel():
            return dq, dk, dv, None, None, None
        grad = grad_BSHV.to(q.dtype).contiguous()
        delta_BSH = row_dots(grad, out_BSHV)
        widths = Widths.of(Q, V)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        sizes = (S, H, H // G, ctx.scale, ctx.scale * LOG2_E, Q, V, *widths)
        flags = (masks.ids_BS is not None, masks.selected_BSS is not None)
        launch = keys_launch(widths, q.element_size())
        gradients_of_keys[(triton.cdiv(S, launch.keys) * B * G,)](
            q, k, v, grad, lse_BHS, delta_BSH, masks.ids_BS, masks.last_BS, masks.selected_BSS, dk, dv,
            *strides, *sizes, launch.queries, launch.keys, *flags,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
        launch = queries_launch(widths, q.element_size())
        gradients_of_queries[(triton.cdiv(S, launch.queries) * B * H,)](
            q, k, v, grad, lse_BHS, delta_BSH, masks.ids_BS, masks.first_BS, masks.selected_BSS, dq,
            *strides, *sizes, launch.queries, launch.keys, *flags,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype` with numbers of a row next to each other; copied only where it has to be."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Σ a ⊙ b over the last dimension of two contiguous tensors, in float32."""
    width, dots = a.shape[-1], a.new_empty(a.shape[:-1], dtype=torch.float32)
    tile = next_power_of_two(width)
    rows = max(1, 4096 // tile)
    dot_of_rows[(triton.cdiv(dots.numel(), rows),)](a, b, dots, dots.numel(), width, rows, tile)
    return dots
