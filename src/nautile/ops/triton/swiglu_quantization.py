"""SwiGLU and its backward, fused with their FP8 quantisation: each input is read once, no float32 is written.

The backward quantises its result along both dimensions at once, in squares of 128 tokens × 128 features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nautile.ops.triton.quantization import magnitude, rounded, scale_of, why_not
from nautile.ops.triton.support import next_power_of_two

__all__ = ["swiglu_quantize", "swiglu_quantize_backward", "why_not"]

LENGTH = tl.constexpr(128)
"""Of a block."""
BLOCK = 128


def swiglu_quantize(
    gate_up_T2F: Tensor, weight_T: Tensor | None, ue8m0: bool, transpose: bool
) -> tuple[Tensor, Tensor]:
    """(data, scale); see `nautile.ops.swiglu_quantize`."""
    T, F = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    R, C = (F, T) if transpose else (T, F)
    data, scale = _empty(R, C, gate_up_T2F)
    if data.numel():
        rows = min(32, next_power_of_two(R))
        at, af = gate_up_T2F.stride()
        xr, xc = (af, at) if transpose else (at, af)
        weight = weight_T.contiguous() if weight_T is not None else None
        grid = (triton.cdiv(R, rows) * triton.cdiv(C, BLOCK),)
        _forward[grid](gate_up_T2F, weight, data, scale, R, C, xr, xc, F * af, rows, transpose, ue8m0)
    return data, scale


def swiglu_quantize_backward(
    grad_TF: Tensor, gate_up_T2F: Tensor, weight_T: Tensor | None, ue8m0: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor | None]:
    """Rows, columns, gradient of the weights; see `nautile.ops.swiglu_quantize_backward`."""
    T, F = grad_TF.shape
    rows, columns = _empty(T, 2 * F, grad_TF), _empty(2 * F, T, grad_TF)
    weight = weight_T.contiguous() if weight_T is not None else None
    # Each square has its own sum: added up in one order, so that equal inputs give equal bits.
    parts = grad_TF.new_zeros(T, F // BLOCK, dtype=torch.float32) if weight is not None else None
    if grad_TF.numel():
        grid = (triton.cdiv(T, BLOCK) * (F // BLOCK),)
        _backward[grid](
            grad_TF, gate_up_T2F, weight, *rows, *columns, parts, T, F,
            *grad_TF.stride(), *gate_up_T2F.stride(), ue8m0, num_warps=16,
        )  # fmt: skip
    return rows, columns, None if parts is None else parts.sum(-1)


def _empty(R: int, C: int, like: Tensor) -> tuple[Tensor, Tensor]:
    data = torch.empty(R, C, dtype=torch.float8_e4m3fn, device=like.device)
    return data, torch.empty(R, triton.cdiv(C, BLOCK), dtype=torch.float32, device=like.device)


@triton.jit
def _sigmoid(x):
    """By the exponential of a negative number, which does not overflow."""
    z = tl.exp(-tl.abs(x))
    return tl.where(x < 0, z, 1.0) / (1 + z)


@triton.jit
def _forward(
    gate_up, weight, data, scale, R, C, xr, xc, to_up,
    ROWS: tl.constexpr, TRANSPOSED: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(C, LENGTH)
    down, j = tl.program_id(0) // across, tl.program_id(0) % across
    row_R = down.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_C = j.to(tl.int64) * LENGTH + tl.arange(0, LENGTH)
    inside = (row_R < R)[:, None] & (column_C < C)[None, :]
    at = gate_up + row_R[:, None] * xr + column_C[None, :] * xc
    gate = tl.load(at, inside, 0.0).to(tl.float32)
    y = gate * _sigmoid(gate) * tl.load(at + to_up, inside, 0.0).to(tl.float32)
    if weight is not None:
        if TRANSPOSED:
            y *= tl.load(weight + column_C, column_C < C, 0.0)[None, :]
        else:
            y *= tl.load(weight + row_R, row_R < R, 0.0)[:, None]
    s_R = scale_of(tl.max(magnitude(y), 1), UE8M0)
    tl.store(scale + row_R * across + j, s_R, row_R < R)
    tl.store(data + row_R[:, None] * C + column_C[None, :], rounded(y * tl.div_rn(1.0, s_R)[:, None]), inside)


@triton.jit
def _backward(
    grad, gate_up, weight, rows, row_scale, columns, column_scale, parts, T, F, gt, gf, xt, xf, UE8M0: tl.constexpr
):
    across = F // LENGTH
    i, j = (tl.program_id(0) // across).to(tl.int64), tl.program_id(0) % across
    # One 64-bit offset per square and 32 bits within it: 64-bit offsets of every element would fill the registers.
    t, f = tl.arange(0, LENGTH), tl.arange(0, LENGTH)
    left = (T - i * LENGTH).to(tl.int32)
    inside = (t < left)[:, None] & (f < LENGTH)[None, :]
    dy_at = grad + i * LENGTH * gt + j * LENGTH * gf + t[:, None] * gt + f[None, :] * gf
    gate_at = gate_up + i * LENGTH * xt + j * LENGTH * xf + t[:, None] * xt + f[None, :] * xf
    factor = 1.0
    if weight is not None:
        factor = tl.load(weight + i * LENGTH + t, t < left, 0.0)[:, None]

    dy, gate = tl.load(dy_at, inside, 0.0).to(tl.float32), tl.load(gate_at, inside, 0.0).to(tl.float32)
    dy *= tl.load(gate_at + F * xf, inside, 0.0).to(tl.float32)
    sigmoid = _sigmoid(gate)
    if weight is not None:
        tl.store(parts + (i * LENGTH + t) * across + j, tl.sum(dy * (gate * sigmoid), 1), t < left)
    dgate = dy * factor * (sigmoid * (1 + gate * (1 - sigmoid)))
    _both_ways(dgate, rows, row_scale, columns, column_scale, i, j, T, 2 * F, left, UE8M0)

    # Read again, from the cache: kept in registers, they would not leave enough for the lines above.
    dy, gate = tl.load(dy_at, inside, 0.0).to(tl.float32), tl.load(gate_at, inside, 0.0).to(tl.float32)
    dup = dy * factor * (gate * _sigmoid(gate))
    _both_ways(dup, rows, row_scale, columns, column_scale, i, across + j, T, 2 * F, left, UE8M0)


@triton.jit
def _both_ways(x, rows, row_scale, columns, column_scale, i, j, T, C, left, UE8M0: tl.constexpr):
    """Quantise square (i, j) of [T, C], which has `left` rows, along its rows and along its columns."""
    t, c = tl.arange(0, LENGTH), tl.arange(0, LENGTH)
    inside = (t < left)[:, None] & (c < LENGTH)[None, :]
    size = magnitude(x)
    s_t = scale_of(tl.max(size, 1), UE8M0)
    tl.store(row_scale + (i * LENGTH + t) * (C // LENGTH) + j, s_t, t < left)
    base = rows + i * LENGTH * C + j * LENGTH
    tl.store(base + t[:, None] * C + c[None, :], rounded(x * tl.div_rn(1.0, s_t)[:, None]), inside)
    s_c = scale_of(tl.max(size, 0), UE8M0)
    tl.store(column_scale + (j * LENGTH + c) * tl.cdiv(T, LENGTH) + i, s_c)
    base = columns + j.to(tl.int64) * LENGTH * T + i * LENGTH
    tl.store(base + c[None, :] * T + t[:, None], rounded(x * tl.div_rn(1.0, s_c)[None, :]), inside)
