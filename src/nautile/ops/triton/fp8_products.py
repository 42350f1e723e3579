"""FP8 products on a GPU: one tile of the result per program, its sums promoted to float32 after every 128 of K.

M, N, K and G as in `nautile.ops.fp8_products`.
"""

import triton
import triton.language as tl
from torch import Tensor

from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.triton import support
from nautile.ops.triton.product_tiles import (
    BY_ROW,
    COUNTED,
    DENSE,
    Tiles,
    dense_tiles,
    grouped_tiles,
    narrow_tiles,
    stretch,
    tile_of,
)

why_not = support.fp8


def fp8_gemm(a: Fp8Tensor, b: Fp8Tensor, c_MN: Tensor | None, out_MN: Tensor) -> Tensor:
    """See `nautile.ops.fp8_gemm`."""
    M, N = out_MN.shape
    add = None if c_MN is None else c_MN[None]
    _launch(a, b, out_MN[None], add, None, DENSE, dense_tiles(M, N), 1)
    return out_MN


def grouped_fp8_gemm(a: Fp8Tensor, b: Fp8Tensor, groups_M: Tensor, out_MN: Tensor, alignment: int) -> Tensor:
    """See `nautile.ops.grouped_fp8_gemm`."""
    tiles = grouped_tiles(out_MN.shape[0], out_MN.shape[1], alignment)
    _launch(a, b, out_MN[None], None, groups_M.contiguous(), BY_ROW, tiles, 1)
    return out_MN


def masked_fp8_gemm(a: Fp8Tensor, b: Fp8Tensor, counts_G: Tensor, out_GMN: Tensor) -> Tensor:
    """See `nautile.ops.masked_fp8_gemm`."""
    G, M, N = out_GMN.shape
    _launch(a, b, out_GMN, None, counts_G.contiguous(), COUNTED, dense_tiles(M, N), G)
    return out_GMN


def k_grouped_fp8_gemm(
    a: Fp8Tensor, b: Fp8Tensor, ends_G: Tensor, c_GMN: Tensor | None, out_GMN: Tensor, alignment: int
) -> Tensor:
    """See `nautile.ops.k_grouped_fp8_gemm`."""
    G, M, N = out_GMN.shape
    if not out_GMN.numel():
        return out_GMN
    tiles = narrow_tiles(M, N)
    c = out_GMN if c_GMN is None else c_GMN
    k_grouped_fp8_kernel[(tiles.count(M, N), G)](
        a.data, a.scale, b.data, b.scale, c, out_GMN, ends_G.contiguous(), M, N, alignment,
        *a.data.stride(), *a.scale.stride(), *b.data.stride(), *b.scale.stride(), *c.stride(), *out_GMN.stride(),
        HAS_C=c_GMN is not None, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, num_warps=tiles.warps, num_stages=3,
    )  # fmt: skip
    return out_GMN


def _launch(
    a: Fp8Tensor, b: Fp8Tensor, out_GMN: Tensor, c_GMN: Tensor | None, layout: Tensor | None, mode: int, tiles: Tiles,
    batches: int,
) -> None:  # fmt: skip
    """One program per tile of each batch; operands without groups are a batch of one."""
    if not out_GMN.numel():
        return
    a_data, a_scale, b_data, b_scale = (x if x.dim() == 3 else x[None] for x in (a.data, a.scale, b.data, b.scale))
    _, M, N = out_GMN.shape
    c = out_GMN if c_GMN is None else c_GMN
    fp8_product_kernel[(tiles.count(M, N), batches)](
        a_data, a_scale, b_data, b_scale, c, out_GMN, a_scale if layout is None else layout, M, N, a.shape[-1],
        *a_data.stride(), *a_scale.stride(), *b_data.stride(), *b_scale.stride(), *c.stride(), *out_GMN.stride(),
        MODE=mode, B_ROWS=b.block[0], HAS_C=c_GMN is not None,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, num_warps=tiles.warps, num_stages=3,
    )  # fmt: skip


@triton.jit
def fp8_product_kernel(
    a, a_scale, b, b_scale, c, out, layout,
    M, N, K,
    a_g, a_m, a_k, sa_g, sa_m, sa_k, b_g, b_n, b_k, sb_g, sb_n, sb_k, c_g, c_m, c_n, out_g, out_m, out_n,
    MODE: tl.constexpr, B_ROWS: tl.constexpr, HAS_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (t, g): tile t of the result of batch g. `layout` is the groups of rows, or the counts of batches."""
    BLOCK_K: tl.constexpr = 128
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    g = tl.program_id(1).to(tl.int64)
    row_M, column_N, k_K = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    rows, stop, weight = M, K, g
    if MODE == 1:  # BY_ROW: the tile's first row tells whether it has any, and whose they are
        first = tl.load(layout + m)
        stop = tl.where(first < 0, 0, K)
        weight = tl.maximum(first, 0).to(tl.int64)
    if MODE == 2:  # COUNTED
        rows = tl.load(layout + g)
        stop = tl.where(m < rows, K, 0)
    real_M, real_N = row_M < rows, column_N < N
    row_M64, column_N64 = row_M.to(tl.int64), column_N.to(tl.int64)
    a_MK = a + g * a_g + row_M64[:, None] * a_m + k_K[None, :] * a_k
    b_KN = b + weight * b_g + column_N64[None, :] * b_n + k_K[:, None] * b_k
    sa_M = a_scale + g * sa_g + row_M64 * sa_m
    sb_N = b_scale + weight * sb_g + column_N64 // B_ROWS * sb_n
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, stop, BLOCK_K):
        x_MK = tl.load(a_MK, mask=real_M[:, None], other=0.0)
        y_KN = tl.load(b_KN, mask=real_N[None, :], other=0.0)
        scale_M = tl.load(sa_M, mask=real_M, other=0.0)
        scale_N = tl.load(sb_N, mask=real_N, other=0.0)
        sum_MN += tl.dot(x_MK, y_KN) * (scale_M[:, None] * scale_N[None, :])
        a_MK += BLOCK_K * a_k
        b_KN += BLOCK_K * b_k
        sa_M += sa_k
        sb_N += sb_k
    real_MN = real_M[:, None] & real_N[None, :]
    if MODE == 1:
        group_M = tl.load(layout + row_M, mask=real_M, other=-1)
        sum_MN = tl.where(group_M[:, None] >= 0, sum_MN, 0.0)
    if HAS_C:
        c_MN = c + g * c_g + row_M64[:, None] * c_m + column_N64[None, :] * c_n
        sum_MN += tl.load(c_MN, mask=real_MN, other=0.0).to(tl.float32)
    out_MN = out + g * out_g + row_M64[:, None] * out_m + column_N64[None, :] * out_n
    tl.store(out_MN, sum_MN.to(out.dtype.element_ty), mask=real_MN)


@triton.jit
def k_grouped_fp8_kernel(
    a, a_scale, b, b_scale, c, out, ends,
    M, N, alignment,
    a_m, a_k, sa_m, sa_k, b_n, b_k, sb_n, sb_k, c_g, c_m, c_n, out_g, out_m, out_n,
    HAS_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (t, g): tile t of the product over group g's stretch of K."""
    BLOCK_K: tl.constexpr = 128
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    g = tl.program_id(1).to(tl.int64)
    start, stop = stretch(ends, g, alignment)
    row_M, column_N, k_K = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    real_M, real_N = row_M < M, column_N < N
    row_M64, column_N64 = row_M.to(tl.int64), column_N.to(tl.int64)
    at = start.to(tl.int64)
    a_MK = a + row_M64[:, None] * a_m + (at + k_K)[None, :] * a_k
    b_KN = b + column_N64[None, :] * b_n + (at + k_K)[:, None] * b_k
    sa_M = a_scale + row_M64 * sa_m + at // BLOCK_K * sa_k
    sb_N = b_scale + column_N64 * sb_n + at // BLOCK_K * sb_k
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(start, stop - BLOCK_K + 1, BLOCK_K):
        x_MK = tl.load(a_MK, mask=real_M[:, None], other=0.0)
        y_KN = tl.load(b_KN, mask=real_N[None, :], other=0.0)
        scale_M = tl.load(sa_M, mask=real_M, other=0.0)
        scale_N = tl.load(sb_N, mask=real_N, other=0.0)
        sum_MN += tl.dot(x_MK, y_KN) * (scale_M[:, None] * scale_N[None, :])
        a_MK += BLOCK_K * a_k
        b_KN += BLOCK_K * b_k
        sa_M += sa_k
        sb_N += sb_k
    rest = (stop - start) % BLOCK_K
    if rest > 0:
        # The last block is there as a whole, and its padding is cleared after loading: a mask along K would make the
        # loads byte by byte.
        x_MK = first_columns(tl.load(a_MK, mask=real_M[:, None], other=0.0), (k_K < rest)[None, :])
        y_KN = first_columns(tl.load(b_KN, mask=real_N[None, :], other=0.0), (k_K < rest)[:, None])
        scale_M = tl.load(sa_M, mask=real_M, other=0.0)
        scale_N = tl.load(sb_N, mask=real_N, other=0.0)
        sum_MN += tl.dot(x_MK, y_KN) * (scale_M[:, None] * scale_N[None, :])
    real_MN = real_M[:, None] & real_N[None, :]
    if HAS_C:
        c_MN = c + g * c_g + row_M64[:, None] * c_m + column_N64[None, :] * c_n
        sum_MN += tl.load(c_MN, mask=real_MN, other=0.0)
    tl.store(out + g * out_g + row_M64[:, None] * out_m + column_N64[None, :] * out_n, sum_MN, mask=real_MN)


@triton.jit
def first_columns(x, real):
    """FP8 numbers where `real`, zeros elsewhere."""
    bits = x.to(tl.uint8, bitcast=True)
    return tl.where(real, bits, 0).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
