"""FP8 quantisers: one kernel, whose strides turn it into the transposed ones.

A program has one row of blocks (1, c), as many as make a good tile, or one block (r, c). Divisions are those of IEEE
(``div_rn``; plain ``/`` is an approximation on a GPU), so results equal the reference bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nautile.ops.fp8_tensor import Block, Fp8Tensor
from nautile.ops.triton.scale_packing import ceil_to_ue8m0
from nautile.ops.triton.support import FLOATS, fp8, next_power_of_two

TILE = 4096
"""Elements of a tile of several blocks."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot take `dtype`, or `device` has no FP8."""
    if dtype not in FLOATS and dtype != torch.float8_e4m3fn:
        return f"{dtype} is not one of float32, bfloat16, float16, float8_e4m3fn"
    return fp8(device, torch.float8_e4m3fn)


def quantize_fp8(x: Tensor, block: Block, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """(data, scale); see `nautile.ops.quantize_fp8`."""
    return _quantized(x, None, (1, 1), block, ue8m0)


def requantize_transposed(x: Fp8Tensor, block: Block, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """(data, scale); see `nautile.ops.requantize_transposed`."""
    t = x.t()
    return _quantized(t.data, t.scale, t.block, block, ue8m0)


def dequantize_fp8(x: Fp8Tensor, dtype: torch.dtype) -> Tensor:
    """See `nautile.ops.dequantize_fp8`."""
    R, C = x.shape[-2:]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel():
        data, scale, flat = (_stack(z) for z in (x.data, x.scale, y))
        tile = (16, 128)
        grid = (triton.cdiv(R, tile[0]) * triton.cdiv(C, tile[1]) * data.shape[0],)
        _dequantize[grid](data, scale, flat, R, C, *data.stride(), *scale.stride(), *flat.stride(), *x.block, *tile)
    return y


def _quantized(x: Tensor, x_scale: Tensor | None, x_block: Block, block: Block, ue8m0: bool) -> tuple[Tensor, Tensor]:
    (r, c), (R, C) = block, x.shape[-2:]
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-2], -(-R // r), -(-C // c)), dtype=torch.float32, device=x.device)
    if data.numel():
        tensors = [_stack(z) for z in (x, data, scale)]
        given = None if x_scale is None else _stack(x_scale)
        if c == 1 and r > 1:  # columns of blocks are rows of the transposes
            tensors, given = [z.mT for z in tensors], None if given is None else given.mT
            r, c, R, C, x_block = c, r, C, R, x_block[::-1]
        tile_c = next_power_of_two(c)
        rows = max(1, min(TILE // tile_c, next_power_of_two(R))) if r == 1 else r
        grid = (triton.cdiv(R, rows) * triton.cdiv(C, c) * tensors[0].shape[0],)  # other axes end at 65535
        xs, ds, ss = tensors
        _quantize[grid](
            xs, given, ds, ss, R, C,
            *xs.stride(), *(given.stride() if given is not None else (0, 0, 0)), *ds.stride(), *ss.stride(),
            *x_block, rows, c, next_power_of_two(rows), tile_c, r > 1, ue8m0,
            num_warps=8 if rows * tile_c > 2 * TILE else 4,
        )  # fmt: skip
    return data, scale


def _stack(x: Tensor) -> Tensor:
    """[B, R, C] as a view where one exists; results have one."""
    return x.flatten(0, -3) if x.dim() > 3 else x[None] if x.dim() == 2 else x


@triton.jit
def scale_of(amax, UE8M0: tl.constexpr):
    """float32: the factor that brings numbers up to `amax` within those of FP8."""
    scale = tl.div_rn(tl.maximum(amax, 1e-4), 448.0)
    if UE8M0:
        scale = ceil_to_ue8m0(scale)
    return scale


@triton.jit
def rounded(x):
    """float8e4nv, nearest even, out of range the largest, NaN kept."""
    nan: tl.constexpr = tl.PropagateNan.ALL
    return tl.maximum(tl.minimum(x, 448.0, nan), -448.0, nan).to(tl.float8e4nv)


@triton.jit
def magnitude(x):
    """|x|, where NaN counts as infinity: a maximum would pass over it."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _place(height, across):
    """Row and column of this program's tile in its matrix of height × across tiles, and the matrix, in 64 bits."""
    place, matrix = tl.program_id(0) % (height * across), tl.program_id(0) // (height * across)
    return place // across, place % across, matrix.to(tl.int64)


@triton.jit
def _quantize(
    x, x_scale, data, scale, R, C,
    xb, xr, xc, gb, gr, gc, db, dr, dc, sb, sr, sc,
    GIVEN_R: tl.constexpr, GIVEN_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TILE_R: tl.constexpr, TILE_C: tl.constexpr, WHOLE: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    down, j, b = _place(tl.cdiv(R, ROWS), tl.cdiv(C, COLUMNS))
    i_R, i_C = tl.arange(0, TILE_R), tl.arange(0, TILE_C)
    row_R, column_C = down.to(tl.int64) * ROWS + i_R, j.to(tl.int64) * COLUMNS + i_C
    inside_R, inside_C = (i_R < ROWS) & (row_R < R), (i_C < COLUMNS) & (column_C < C)
    inside = inside_R[:, None] & inside_C[None, :]
    wide = tl.load(x + b * xb + row_R[:, None] * xr + column_C[None, :] * xc, inside, 0.0).to(tl.float32)
    if x_scale is not None:
        at = b * gb + (row_R // GIVEN_R)[:, None] * gr + (column_C // GIVEN_C)[None, :] * gc
        wide *= tl.load(x_scale + at, inside, 0.0)
    amax_R = tl.max(magnitude(wide), 1)
    if WHOLE:
        s = scale_of(tl.max(amax_R, 0), UE8M0)
        tl.store(scale + b * sb + down * sr + j * sc, s)
        y = rounded(wide * tl.div_rn(1.0, s))
    else:
        s_R = scale_of(amax_R, UE8M0)
        tl.store(scale + b * sb + row_R * sr + j * sc, s_R, inside_R)
        y = rounded(wide * tl.div_rn(1.0, s_R)[:, None])
    tl.store(data + b * db + row_R[:, None] * dr + column_C[None, :] * dc, y, inside)


@triton.jit
def _dequantize(
    data, scale, y, R, C, db, dr, dc, sb, sr, sc, yb, yr, yc,
    GIVEN_R: tl.constexpr, GIVEN_C: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    down, j, b = _place(tl.cdiv(R, TILE_R), tl.cdiv(C, TILE_C))
    row_R = down.to(tl.int64) * TILE_R + tl.arange(0, TILE_R)
    column_C = j.to(tl.int64) * TILE_C + tl.arange(0, TILE_C)
    inside = (row_R < R)[:, None] & (column_C < C)[None, :]
    x = tl.load(data + b * db + row_R[:, None] * dr + column_C[None, :] * dc, inside, 0.0).to(tl.float32)
    s = tl.load(scale + b * sb + (row_R // GIVEN_R)[:, None] * sr + (column_C // GIVEN_C)[None, :] * sc, inside, 0.0)
    at = b * yb + row_R[:, None] * yr + column_C[None, :] * yc
    tl.store(y + at, (x * s).to(y.dtype.element_ty), inside)
