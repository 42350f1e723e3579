"""12-bit numbers, shifted into words and out of them in registers; the bits of the reference."""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from nautile.ops.triton.quantization import magnitude
from nautile.ops.triton.scale_packing import ceil_to_ue8m0
from nautile.ops.triton.support import FLOATS, next_power_of_two

TILE = 4096


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The usual floats."""
    return None if dtype in FLOATS else f"{dtype} is not one of float32, bfloat16, float16"


def quantize_e5m6(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(data, scale); see `nautile.ops.quantize_e5m6`."""
    *lead, R, C = x.shape
    across = triton.cdiv(C, block)
    words = torch.empty(*lead, R, C // 8 * 3, dtype=torch.int32, device=x.device)
    scale = torch.empty(*lead, R, across, dtype=torch.float32, device=x.device)
    if x.numel():
        flat = x.reshape(prod(lead) * R, C)
        rows = max(1, min(TILE // next_power_of_two(block), next_power_of_two(len(flat))))
        grid = (triton.cdiv(len(flat), rows) * across,)
        _pack_rows[grid](flat, words, scale, len(flat), C, *flat.stride(), block, rows, next_power_of_two(block // 8))
    return words.view(torch.uint8), scale


def dequantize_e5m6(data: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """See `nautile.ops.dequantize_e5m6`."""
    *lead, size = data.shape
    C = size // 3 * 2
    y = torch.empty(*lead, C, dtype=dtype, device=data.device)
    if y.numel():
        words = data.contiguous().view(torch.int32)
        R, tile = prod(lead), (16, 128)
        grid = (triton.cdiv(R, tile[0]) * triton.cdiv(C, tile[1]),)
        _unpack_rows[grid](words, scale.contiguous(), y, R, C, block, *tile)
    return y


@triton.jit
def _codes(x):
    """int32 in [0, 4096); see `nautile.ops.reference.e5m6`."""
    size = tl.minimum(tl.abs(x), 65024.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) >> 17) - ((127 - 15) << 6)
    small = (size + 8.0).to(tl.int32, bitcast=True) - 0x41000000  # the bits of 8
    return tl.where(size < 2.0**-14, small, normal) | ((x.to(tl.int32, bitcast=True) >> 20) & 0x800)


@triton.jit
def _pack_rows(
    x, words, scale, R, C, xr, xc, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    across = tl.cdiv(C, BLOCK)
    down, j = tl.program_id(0) // across, tl.program_id(0) % across
    row = down.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group, place = tl.arange(0, GROUPS), tl.arange(0, 8)
    first = j * BLOCK + group * 8
    inside = (row < R)[:, None] & ((group * 8 < BLOCK) & (first < C))[None, :]
    at = row[:, None, None] * xr + (first[None, :, None] + place[None, None, :]) * xc
    wide = tl.load(x + at, inside[:, :, None], 0.0).to(tl.float32)
    amax = tl.max(tl.max(magnitude(wide), 2), 1)
    s = ceil_to_ue8m0(tl.div_rn(tl.maximum(amax, 1e-4), 65024.0))
    tl.store(scale + row * across + j, s, row < R)
    code = _codes(tl.div_rn(wide, s[:, None, None])).to(tl.int64)
    to = words + row[:, None] * (C // 8 * 3) + (first // 8 * 3)[None, :]
    for word in tl.static_range(3):
        shift = (word * 32 + 20 - place * 12)[None, None, :]  # where the number's lowest bit goes
        moved = tl.where(shift >= 0, code << tl.maximum(shift, 0), code >> tl.maximum(-shift, 0))
        part = tl.sum(tl.where((shift > -12) & (shift < 32), moved & 0xFFFFFFFF, 0), 2)
        tl.store(to + word, part.to(tl.int32), inside)


@triton.jit
def _unpack_rows(words, scale, y, R, C, BLOCK, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    across = tl.cdiv(C, COLUMNS)
    down, j = tl.program_id(0) // across, tl.program_id(0) % across
    row = down.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < R)[:, None] & (column < C)[None, :]
    bit = column % 8 * 12
    at = words + row[:, None] * (C // 8 * 3) + (column // 8 * 3 + bit // 32)[None, :]
    high = tl.load(at, inside, 0).to(tl.int64)
    low = tl.load(at + 1, inside & (bit % 32 > 20)[None, :], 0).to(tl.int64)
    both = (high << 32) | (low & 0xFFFFFFFF)
    code = (both >> (52 - bit % 32)[None, :]) & 0xFFF
    number = (code << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    s = tl.load(scale + row[:, None] * tl.cdiv(C, BLOCK) + (column // BLOCK)[None, :], inside, 0.0)
    tl.store(y + row[:, None] * C + column[None, :], (number * s).to(y.dtype.element_ty), inside)
