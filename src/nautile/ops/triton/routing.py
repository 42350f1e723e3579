"""Expert selection, and moving tokens to their experts' rows and back.

Every element that is written has one program that computes it: nothing is added atomically, so equal inputs give
equal bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.triton.support import FLOATS, next_power_of_two

WIDTH = 1024
"""Features that a program moves at a time."""
NEVER = tl.constexpr(-(2**31))
"""Below the key of every number."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot take `dtype`; rows may be of single bytes."""
    if dtype in FLOATS or dtype.itemsize == 1:
        return None
    return f"{dtype} is not one of float32, bfloat16, float16, nor a byte"


def topk_gate(scores_TE: Tensor, k: int, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """See `nautile.ops.topk_gate`."""
    T, E = scores_TE.shape
    chosen_TK = torch.empty(T, k, dtype=torch.int64, device=scores_TE.device)
    if not T:
        return chosen_TK
    if topk_group == n_group:
        n_group = topk_group = 1
    size = E // n_group
    tile_g, tile_m = next_power_of_two(n_group), next_power_of_two(size)
    tokens = max(1, min(16, next_power_of_two(T), 2048 // (tile_g * tile_m)))
    _topk_gate[(triton.cdiv(T, tokens),)](
        scores_TE, chosen_TK, T, *scores_TE.stride(), k, topk_group, n_group, size,
        tokens, tile_g, tile_m, topk_group < n_group, group_score == "top2_sum",
    )  # fmt: skip
    return chosen_TK


def permute_tokens(x_TD: Tensor, choice_R: Tensor, row_TK: Tensor) -> Tensor:
    """See `nautile.ops.permute_tokens`."""
    return _Permute.apply(x_TD, choice_R, row_TK)


def combine_tokens(y_RD: Tensor, choice_R: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """See `nautile.ops.combine_tokens`."""
    return _Combine.apply(y_RD, weights_TK, choice_R, row_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, choice_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(choice_R, row_TK)
        return _spread(x_TD, None, choice_R, row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad_RD, None, ctx.saved_tensors[1]), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor | None, choice_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, choice_R, row_TK)
        return _gather(y_RD, weights_TK, row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        y_RD, weights_TK, choice_R, row_TK = ctx.saved_tensors
        wants_y, wants_weights = ctx.needs_input_grad[:2]
        grad_y = _spread(grad_TD, weights_TK, choice_R, row_TK) if wants_y else None
        return grad_y, _dots(grad_TD, y_RD, row_TK) if wants_weights else None, None, None


def _spread(x_TD: Tensor, weights_TK: Tensor | None, choice_R: Tensor, row_TK: Tensor) -> Tensor:
    """[R, D]: the token of each row's choice, times the choice's weight; 0 for padding."""
    R, D = len(choice_R), x_TD.shape[1]
    y_RD = x_TD.new_empty(R, D)
    if y_RD.numel():
        width = min(WIDTH, next_power_of_two(D))
        weights = None if weights_TK is None else weights_TK.contiguous()
        grid = (R, triton.cdiv(D, width))
        _spread_rows[grid](x_TD, weights, choice_R, y_RD, D, row_TK.shape[1], *x_TD.stride(), width)
    return y_RD


def _gather(y_RD: Tensor, weights_TK: Tensor | None, row_TK: Tensor) -> Tensor:
    """[T, D]: the sum of the rows of each token's choices, times their weights."""
    (T, K), D = row_TK.shape, y_RD.shape[1]
    x_TD = y_RD.new_empty(T, D)
    if x_TD.numel():
        width = min(WIDTH, next_power_of_two(D))
        weights = None if weights_TK is None else weights_TK.contiguous()
        _gather_rows[(T, triton.cdiv(D, width))](y_RD, weights, row_TK, x_TD, D, K, *y_RD.stride(), width)
    return x_TD


def _dots(grad_TD: Tensor, y_RD: Tensor, row_TK: Tensor) -> Tensor:
    """float32 [T, K]: ``grad_t · y_row(t, k)``."""
    (T, K), D = row_TK.shape, y_RD.shape[1]
    dots_TK = torch.empty(T, K, dtype=torch.float32, device=y_RD.device)
    if dots_TK.numel():
        width = min(WIDTH, next_power_of_two(D))
        _row_dots[(T * K,)](grad_TD, y_RD, row_TK, dots_TK, D, K, *grad_TD.stride(), *y_RD.stride(), width)
    return dots_TK


@triton.jit
def _key(x):
    """int32, ordered as floats are, both zeros alike."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _topk_gate(
    scores, chosen, T, st, se, K, kept, n_group, size,
    TOKENS: tl.constexpr, TILE_G: tl.constexpr, TILE_M: tl.constexpr, LIMITED: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    g, m = tl.arange(0, TILE_G)[None, :, None], tl.arange(0, TILE_M)[None, None, :]
    inside = (t < T)[:, None, None] & (g < n_group) & (m < size)
    x = tl.load(scores + t[:, None, None] * st + (g * size + m) * se, inside, float("-inf"))
    key = tl.where(inside, _key(x), NEVER)
    if LIMITED:
        group = tl.max(x, 2)
        if TWO:
            first = tl.argmax(key, 2)
            group += tl.max(tl.where(m == first[:, :, None], float("-inf"), x), 2)
        places = tl.arange(0, TILE_G)[None, :]
        left = tl.where(places < n_group, _key(group), NEVER)
        keep = left < NEVER
        for _ in range(kept):
            here = places == tl.argmax(left, 1)[:, None]
            keep = keep | here
            left = tl.where(here, NEVER, left)
        key = tl.where(keep[:, :, None] | (key == NEVER), key, -2139095041)  # that of −∞
    key = tl.reshape(key, (TOKENS, TILE_G * TILE_M))
    places = tl.arange(0, TILE_G * TILE_M)[None, :]
    for k in range(K):
        place = tl.argmax(key, 1)
        tl.store(chosen + t * K + k, ((place // TILE_M) * size + place % TILE_M).to(tl.int64), t < T)
        key = tl.where(places == place[:, None], NEVER, key)


@triton.jit
def _spread_rows(x, weights, choices, y, D, K, xt, xd, WIDTH: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    choice = tl.load(choices + r)
    row = tl.load(x + (choice // K) * xt + d * xd, (d < D) & (choice >= 0), 0)
    if weights is not None:
        row = row.to(tl.float32) * tl.load(weights + choice, choice >= 0, 0.0)
    tl.store(y + r * D + d, row.to(y.dtype.element_ty), d < D)


@triton.jit
def _gather_rows(y, weights, rows, x, D, K, yr, yd, WIDTH: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for k in range(K):
        row = tl.load(rows + t * K + k)
        part = tl.load(y + row * yr + d * yd, (d < D) & (row >= 0), 0).to(tl.float32)
        if weights is not None:
            part *= tl.load(weights + t * K + k, row >= 0, 0.0)
        total += part
    tl.store(x + t * D + d, total.to(x.dtype.element_ty), d < D)


@triton.jit
def _row_dots(grad, y, rows, dots, D, K, gt, gd, yr, yd, WIDTH: tl.constexpr):
    choice = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + choice)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, D, WIDTH):
        d = start + tl.arange(0, WIDTH)
        inside = (d < D) & (row >= 0)
        here = tl.load(grad + (choice // K) * gt + d * gd, inside, 0.0).to(tl.float32)
        total += here * tl.load(y + row * yr + d * yd, inside, 0.0).to(tl.float32)
    tl.store(dots + choice, tl.sum(total, 0))
