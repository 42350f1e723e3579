"""Specification of the FP8 products: the numbers that FP8 and scales stand for, multiplied in float32.

Scaling first and multiplying after is the promoted sum of the formula up to the order of float32 roundings: an e4m3
number has 4 bits, so a product of two is exact in float32, and both ways add such products in float32, each block's
with its scales. One large product is then as good as many of 128, and a CPU multiplies it in one call.
"""

import torch
from torch import Tensor

from nautile.ops import group_layout
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.precision import no_autocast


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def fp8_gemm(a: Fp8Tensor, b: Fp8Tensor, c_MN: Tensor | None, out_MN: Tensor) -> Tensor:
    """See `nautile.ops.fp8_gemm`."""
    d_MN = product(numbers(a), numbers(b))
    return out_MN.copy_(d_MN if c_MN is None else d_MN.add_(c_MN))


def grouped_fp8_gemm(a: Fp8Tensor, b: Fp8Tensor, groups_M: Tensor, out_MN: Tensor, alignment: int) -> Tensor:
    """See `nautile.ops.grouped_fp8_gemm`."""
    out_MN.zero_()
    for g, start, stop in group_layout.runs(groups_M):
        rows = Fp8Tensor(a.data[start:stop], a.scale[start:stop], a.block)
        out_MN[start:stop] = product(numbers(rows), numbers(b[g]))
    return out_MN


def masked_fp8_gemm(a: Fp8Tensor, b: Fp8Tensor, counts_G: Tensor, out_GMN: Tensor) -> Tensor:
    """See `nautile.ops.masked_fp8_gemm`."""
    for g, count in enumerate(counts_G.tolist()):
        rows = Fp8Tensor(a.data[g, :count], a.scale[g, :count], a.block)
        out_GMN[g, :count] = product(numbers(rows), numbers(b[g]))
    return out_GMN


def k_grouped_fp8_gemm(
    a: Fp8Tensor, b: Fp8Tensor, ends_G: Tensor, c_GMN: Tensor | None, out_GMN: Tensor, alignment: int
) -> Tensor:
    """See `nautile.ops.k_grouped_fp8_gemm`."""
    for g, (start, stop) in enumerate(group_layout.spans(ends_G, alignment)):
        # Whole blocks are turned into numbers, and the padding in the last one left out.
        a_Mk, b_Nk = (numbers(_columns(x, start, stop))[:, : stop - start] for x in (a, b))
        d_MN = product(a_Mk, b_Nk)
        out_GMN[g] = d_MN if c_GMN is None else d_MN.add_(c_GMN[g])
    return out_GMN


def product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """``A·Bᵀ`` in float32, whatever autocast says."""
    with no_autocast(a_MK):
        return a_MK @ b_NK.t()


def _columns(x: Fp8Tensor, start: int, stop: int) -> Fp8Tensor:
    """Columns of a matrix from the beginning of a block on, with all of the last block."""
    block = x.block[1]
    first, last = start // block, -(-stop // block)
    return Fp8Tensor(x.data[:, start : last * block], x.scale[:, first:last], x.block)


def numbers(x: Fp8Tensor) -> Tensor:
    """float32: what `x` stands for, by the shortest way on a CPU."""
    if x.device.type != "cpu" or x.data.requires_grad:
        return x.dequantize()
    (r, c), (R, C) = x.block, x.shape[-2:]
    # An e4m3 number moved up by 7 bits is a float16 that is 2⁸ times smaller, but for NaN; six times faster than torch.
    bits = x.data.view(torch.int8)
    if not C or C % c or ((bits & 0x7F) == 0x7F).any():
        return x.dequantize()
    small = ((bits.to(torch.int16) << 7) & ~(1 << 14)).view(torch.float16).float()
    scale = x.scale * 256
    if r > 1:
        scale = scale.repeat_interleave(r, dim=-2)[..., :R, :]
    return small.unflatten(-1, (C // c, c)).mul_(scale[..., None]).flatten(-2)
