"""Scales turned around and packed; and powers of two in registers."""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Scales are float32."""
    return None if dtype == torch.float32 else f"{dtype} is not float32"


def mn_major_scales(scale_MJ: Tensor, packed: bool) -> Tensor:
    """See `nautile.ops.scale_packing.mn_major_scales`."""
    *lead, M, J = scale_MJ.shape
    source = scale_MJ.reshape(prod(lead), M, J)
    columns, length = triton.cdiv(J, 4) if packed else J, triton.cdiv(M, 4) * 4
    dtype = torch.int32 if packed else torch.float32
    out = torch.empty(len(source), columns, length, dtype=dtype, device=scale_MJ.device)
    if out.numel():
        grid = (triton.cdiv(length, ROWS), columns, len(source))
        _mn_major[grid](source, out, M, J, length, columns, *source.stride(), packed, ROWS)
    return out.view(*lead, columns, length)[..., :M].mT


@triton.jit
def ceil_to_ue8m0(x):
    """float32: the smallest power of two ≥ x ≥ 0; see `nautile.ops.reference.scale_packing`."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return (tl.minimum(tl.maximum(exponent, 1), 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _mn_major(scale, out, M, J, length, columns, sb, sm, sj, PACKED: tl.constexpr, ROWS: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = scale + b * sb + m * sm
    to = out + (b * columns + j) * length + m
    if PACKED:
        word = tl.zeros((ROWS,), tl.int32)
        for i in tl.static_range(4):
            s = tl.load(at + (j * 4 + i) * sj, (m < M) & (j * 4 + i < J), 0.0)
            word |= (s.to(tl.int32, bitcast=True) >> 23) << (8 * i)
        tl.store(to, word, m < length)
    else:
        tl.store(to, tl.load(at + j * sj, m < M, 0.0), m < length)
