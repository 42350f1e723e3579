"""Grouped products on a GPU: torch's own where it takes the layout, else one tile of the result per program.

M, N, K and G as in `nautile.ops.grouped_products`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nautile.ops import group_layout
from nautile.ops.triton import support
from nautile.ops.triton.product_tiles import BY_ROW, COUNTED, Tiles, dense_tiles, grouped_tiles, stretch, tile_of

why_not = support.floats


def grouped_gemm(
    a_MK: Tensor, b_GNK: Tensor, groups_M: Tensor, ends_G: Tensor | None, out_MN: Tensor, alignment: int
) -> Tensor:
    """See `nautile.ops.grouped_gemm`."""
    if ends_G is not None and a_MK.is_cuda and torch_takes(a_MK, b_GNK, out_MN):
        return by_torch(a_MK, b_GNK, groups_M, ends_G, out_MN, alignment)
    tiles = grouped_tiles(out_MN.shape[0], out_MN.shape[1], alignment)
    _launch(a_MK[None], b_GNK, groups_M, out_MN[None], BY_ROW, tiles)
    return out_MN


def torch_takes(a_MK: Tensor, b_GNK: Tensor, out_MN: Tensor) -> bool:
    """Whether these are bfloat16 with rows that begin at multiples of 16 bytes, as torch's grouped product wants."""
    rows = [(x.stride(-1), x.stride(-2) % 8, x.data_ptr() % 16) for x in (a_MK, b_GNK)]
    return a_MK.dtype == out_MN.dtype == torch.bfloat16 and b_GNK.shape[1] % 8 == 0 and set(rows) == {(1, 0, 0)}


def by_torch(a_MK: Tensor, b_GNK: Tensor, groups_M: Tensor, ends_G: Tensor, out_MN: Tensor, alignment: int) -> Tensor:
    """`torch.nn.functional.grouped_mm`, whose groups follow without gaps: padding is multiplied, then cleared."""
    next_G = torch.cat([group_layout.starts_of(ends_G, alignment)[1:], torch.full_like(ends_G[:1], len(a_MK))])
    d_MN = F.grouped_mm(a_MK, b_GNK.mT, offs=next_G)
    return out_MN.copy_(torch.where(groups_M[:, None] >= 0, d_MN, 0))


def masked_gemm(a_GMK: Tensor, b_GNK: Tensor, counts_G: Tensor, out_GMN: Tensor) -> Tensor:
    """See `nautile.ops.masked_gemm`."""
    _launch(a_GMK, b_GNK, counts_G, out_GMN, COUNTED, dense_tiles(out_GMN.shape[1], out_GMN.shape[2]))
    return out_GMN


def _launch(a: Tensor, b: Tensor, layout: Tensor, out: Tensor, mode: int, tiles: Tiles) -> None:
    if not out.numel():
        return
    batches, M, N = out.shape
    grouped_product_kernel[(tiles.count(M, N), batches)](
        a, b, out, layout.contiguous(), M, N, a.shape[-1], *a.stride(), *b.stride(), *out.stride(),
        MODE=mode, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=_depth(a), num_warps=tiles.warps, num_stages=3,
    )  # fmt: skip


def k_grouped_gemm(
    a_KM: Tensor, b_KN: Tensor, ends_G: Tensor, c_GMN: Tensor | None, out_GMN: Tensor, alignment: int
) -> Tensor:
    """See `nautile.ops.k_grouped_gemm`."""
    if not out_GMN.numel():
        return out_GMN
    G, M, N = out_GMN.shape
    tiles, c = dense_tiles(M, N), out_GMN if c_GMN is None else c_GMN
    k_grouped_product_kernel[(tiles.count(M, N), G)](
        a_KM, b_KN, c, out_GMN, ends_G.contiguous(), M, N, alignment,
        *a_KM.stride(), *b_KN.stride(), *c.stride(), *out_GMN.stride(), HAS_C=c_GMN is not None,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=_depth(a_KM), num_warps=tiles.warps, num_stages=3,
    )  # fmt: skip
    return out_GMN


def _depth(a: Tensor) -> int:
    """Columns of K at once: 128 bytes, the widest row of shared memory that is read without conflicts."""
    return 128 // a.dtype.itemsize


@triton.jit
def grouped_product_kernel(
    a, b, out, layout,
    M, N, K, a_g, a_m, a_k, b_g, b_n, b_k, out_g, out_m, out_n,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (t, g): tile t of the result of batch g. `layout` is the groups of rows, or the counts of batches."""
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    g = tl.program_id(1).to(tl.int64)
    row_M, column_N, k_K = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if MODE == 1:  # BY_ROW: the tile's first row tells whether it has any, and whose they are
        first = tl.load(layout + m)
        rows, stop, weight = M, tl.where(first < 0, 0, K), tl.maximum(first, 0).to(tl.int64)
    else:  # COUNTED
        rows, weight = tl.load(layout + g), g
        stop = tl.where(m < rows, K, 0)
    real_M, real_N = row_M < rows, column_N < N
    row_M64, column_N64 = row_M.to(tl.int64), column_N.to(tl.int64)
    a_MK = a + g * a_g + row_M64[:, None] * a_m + k_K[None, :] * a_k
    b_KN = b + weight * b_g + column_N64[None, :] * b_n + k_K[:, None] * b_k
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, stop, BLOCK_K):
        x_MK = tl.load(a_MK, mask=real_M[:, None] & (k_K < K - k)[None, :], other=0.0)
        y_KN = tl.load(b_KN, mask=real_N[None, :] & (k_K < K - k)[:, None], other=0.0)
        sum_MN = tl.dot(x_MK, y_KN, sum_MN, input_precision="ieee")
        a_MK += BLOCK_K * a_k
        b_KN += BLOCK_K * b_k
    if MODE == 1:
        group_M = tl.load(layout + row_M, mask=real_M, other=-1)
        sum_MN = tl.where(group_M[:, None] >= 0, sum_MN, 0.0)
    out_MN = out + g * out_g + row_M64[:, None] * out_m + column_N64[None, :] * out_n
    tl.store(out_MN, sum_MN.to(out.dtype.element_ty), mask=real_M[:, None] & real_N[None, :])


@triton.jit
def k_grouped_product_kernel(
    a, b, c, out, ends,
    M, N, alignment, a_k, a_m, b_k, b_n, c_g, c_m, c_n, out_g, out_m, out_n,
    HAS_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (t, g): tile t of the product over group g's stretch of K. Rows of K are masked, which costs nothing:
    memory is contiguous along M and N.
    """
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    g = tl.program_id(1).to(tl.int64)
    start, stop = stretch(ends, g, alignment)
    row_M, column_N, k_K = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    real_M, real_N = row_M < M, column_N < N
    row_M64, column_N64 = row_M.to(tl.int64), column_N.to(tl.int64)
    at_K = start.to(tl.int64) + k_K
    a_MK = a + at_K[None, :] * a_k + row_M64[:, None] * a_m
    b_KN = b + at_K[:, None] * b_k + column_N64[None, :] * b_n
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, BLOCK_K):
        x_MK = tl.load(a_MK, mask=real_M[:, None] & (k_K < stop - k)[None, :], other=0.0)
        y_KN = tl.load(b_KN, mask=real_N[None, :] & (k_K < stop - k)[:, None], other=0.0)
        sum_MN = tl.dot(x_MK, y_KN, sum_MN, input_precision="ieee")
        a_MK += BLOCK_K * a_k
        b_KN += BLOCK_K * b_k
    real_MN = real_M[:, None] & real_N[None, :]
    if HAS_C:
        c_MN = c + g * c_g + row_M64[:, None] * c_m + column_N64[None, :] * c_n
        sum_MN += tl.load(c_MN, mask=real_MN, other=0.0).to(tl.float32)
    out_MN = out + g * out_g + row_M64[:, None] * out_m + column_N64[None, :] * out_n
    tl.store(out_MN, sum_MN.to(out.dtype.element_ty), mask=real_MN)
