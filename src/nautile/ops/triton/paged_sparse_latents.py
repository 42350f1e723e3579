"""Sparse decoding over FP8 latents on a GPU: a program gathers one query's chosen rows, for up to 64 of its heads.

A row is read once, dequantised, and is key and value. Its tile holds the first 512 dimensions: FP8 ones and, where a
layout has fewer than 512 of them, rotated ones; rotated ones beyond are a tile of their own, which is no value.

B requests, S queries, H heads, X dimensions of a latent, V of its value, K and L chosen rows, P places of a page,
M heads of a tile, T choices of a tile, J scales of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nautile.ops.latent_layout import MOST_VALUES, latent_parts, layout_of
from nautile.ops.split_kv import BLOCK, TILE, Splits, sparse_parts
from nautile.ops.split_plan import plan_splits
from nautile.ops.triton import support
from nautile.ops.triton.latent_tiles import attend, merge, partial_results, processors, write_split
from nautile.ops.triton.paged_latents import LOG2_E

Scope = tuple[Tensor, Tensor, Tensor | None]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """bfloat16 or float16 queries, where the device knows FP8."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is neither bfloat16 nor float16"
    return support.fp8(device, torch.float8_e4m3fn)


def paged_sparse_mla_decode(
    q_BSHX: Tensor, scopes: list[Scope], scale: float, v_dim: int, sink_H: Tensor | None, splits: Splits | None
) -> tuple[Tensor, Tensor]:
    """See `nautile.ops.paged_sparse_mla_decode`."""
    (B, S, H, X), V, layout = q_BSHX.shape, v_dim, layout_of(scopes[0][0])
    o_BSHV = q_BSHX.new_empty(B, S, H, V)
    lse_BHS = q_BSHX.new_empty(B, H, S, dtype=torch.float32)
    if not o_BSHV.numel():
        return o_BSHV, lse_BHS
    counts = [_counts(rows_BSK, lengths_B) for _, rows_BSK, lengths_B in scopes]
    if splits is None:
        splits = plan_splits(_rows(counts), sparse_parts(processors(q_BSHX.device), S, H))
    part_RSHV, part_RSH = partial_results(splits, S, H, V)
    sides = [_side(scope[0], scope[1], counts_B) for scope, counts_B in zip(scopes, counts, strict=True)]
    main, more = latent_parts(scopes[0][0]), latent_parts(scopes[-1][0])
    views = [(main.fp8_NPF, more.fp8_NPF), (main.scale_NPJ, more.scale_NPJ), (main.rope_NPR, more.rope_NPR)]
    # The second cache is addressed from the first: how far apart they are, in elements.
    apart = [(second.data_ptr() - first.data_ptr()) // first.element_size() for first, second in views]
    tiles = MOST_VALUES // layout.tile
    paged_sparse_mla_decode_kernel[(triton.cdiv(H, TILE) * S, splits.table_R3.shape[0])](
        q_BSHX.contiguous(), splits.table_R3, splits.ends_B, sink_H, o_BSHV, lse_BHS, part_RSHV, part_RSH,
        *(view for view, _ in views), *sides[0], *apart, *sides[-1],
        S, H, V, scale * LOG2_E, HAS_SINK=sink_H is not None, HAS_EXTRA=len(scopes) > 1, EXPONENTS=layout.planes,
        X=X, F=layout.fp8, SCALES=layout.tiles, FP8_ROW=main.fp8_NPF.stride(1), SCALE_ROW=main.scale_NPJ.stride(1),
        ROPE_ROW=main.rope_NPR.stride(1), BLOCK_M=TILE, BLOCK_T=BLOCK, BLOCK_V=MOST_VALUES, BLOCK_J=tiles,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    merge(part_RSHV, part_RSH, splits, o_BSHV, lse_BHS, sink_H)
    return o_BSHV, lse_BHS


def _side(cache_NPZ: Tensor, rows_BSK: Tensor, counts_B: Tensor) -> list:
    """Choices from a cache, and the sizes and strides of its pages."""
    parts = latent_parts(cache_NPZ)
    strides = [x.stride(0) for x in (parts.fp8_NPF, parts.scale_NPJ, parts.rope_NPR)]
    return [rows_BSK.contiguous(), counts_B, rows_BSK.shape[2], *cache_NPZ.shape[:2], *strides]


def _counts(rows_BSK: Tensor, lengths_B: Tensor | None) -> Tensor:
    B, _, K = rows_BSK.shape
    if lengths_B is None:
        return torch.full((B,), K, dtype=torch.int32, device=rows_BSK.device)
    return lengths_B.contiguous()


def _rows(counts: list[Tensor]) -> Tensor:
    """`sparse_length` on the device."""
    main_B = counts[0].clamp_min(1)
    return main_B if len(counts) == 1 else (main_B + BLOCK - 1) // BLOCK * BLOCK + counts[1]


@triton.jit
def paged_sparse_mla_decode_kernel(
    q, splits, ends, sink, out, lse, part, part_lse,
    fp8, scales, rope, rows, counts, K, N, P, stride_fp8, stride_scales, stride_rope,
    to_fp8, to_scales, to_rope, rows_2, counts_2, K_2, N_2, P_2, stride_fp8_2, stride_scales_2, stride_rope_2,
    S, H, V, scale,
    HAS_SINK: tl.constexpr, HAS_EXTRA: tl.constexpr, EXPONENTS: tl.constexpr, X: tl.constexpr, F: tl.constexpr,
    SCALES: tl.constexpr, FP8_ROW: tl.constexpr, SCALE_ROW: tl.constexpr, ROPE_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Program (i · S + s, r): the i-th BLOCK_M heads of query s, over split r.

    Rows of the second cache follow in blocks of their own. One loop serves both, or registers would not suffice.
    """
    split = tl.program_id(1)
    b = tl.load(splits + 3 * split)
    if b < 0:
        return
    begin = tl.load(splits + 3 * split + 1) * BLOCK_T
    stop = tl.load(splits + 3 * split + 2) * BLOCK_T
    s = tl.program_id(0) % S
    h_M = tl.program_id(0) // S * BLOCK_M + tl.arange(0, BLOCK_M)
    there_M, s_M = h_M < H, tl.zeros((BLOCK_M,), tl.int32) + s
    v_V, x_X, t_T = tl.arange(0, BLOCK_V), tl.arange(0, 64), tl.arange(0, BLOCK_T)
    j_J = tl.arange(0, BLOCK_J)
    query = (b * S + s).to(tl.int64)
    q_M = q + (query * H + h_M) * X
    q_MV = tl.load(q_M[:, None] + v_V[None, :], mask=there_M[:, None] & (v_V < X)[None, :], other=0.0)
    tail_MX = there_M[:, None] & (x_X + BLOCK_V < X)[None, :]
    q_MX = tl.load(q_M[:, None] + BLOCK_V + x_X[None, :], mask=tail_MX, other=0.0)
    acc_MV = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    m_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_M = tl.zeros((BLOCK_M,), tl.float32)
    count = tl.load(counts + b)
    if HAS_EXTRA:
        first = tl.maximum(tl.cdiv(count, BLOCK_T), 1) * BLOCK_T
        count_2 = tl.load(counts_2 + b)
        stop = tl.minimum(stop, first + count_2)
    else:
        stop = tl.minimum(stop, count)
    for t in range(begin, stop, BLOCK_T):
        row_T = tl.load(rows + query * K + t + t_T, mask=t + t_T < count, other=-1)
        pages, places, page_fp8, page_scales, page_rope = N, P, stride_fp8, stride_scales, stride_rope
        if HAS_EXTRA:
            second = t >= first
            t_2_T = t - first + t_T
            row_2_T = tl.load(rows_2 + query * K_2 + t_2_T, mask=second & (t_2_T < count_2), other=-1)
            row_T = tl.where(second, row_2_T, row_T)
            pages, places = tl.where(second, N_2, N), tl.where(second, P_2, P)
            page_fp8 = tl.where(second, stride_fp8_2, stride_fp8)
            page_scales = tl.where(second, stride_scales_2, stride_scales)
            page_rope = tl.where(second, stride_rope_2, stride_rope)
        there_T = (row_T >= 0) & (row_T < pages * places)
        page_T, place_T = (row_T // places).to(tl.int64), row_T % places
        fp8_T = page_T * page_fp8 + place_T * FP8_ROW
        scales_T = page_T * page_scales + place_T * SCALE_ROW
        rope_T = page_T * page_rope + place_T * ROPE_ROW
        if HAS_EXTRA:
            fp8_T += tl.where(second, to_fp8, 0)
            scales_T += tl.where(second, to_scales, 0)
            rope_T += tl.where(second, to_rope, 0)
        c_TV = tl.load(fp8 + fp8_T[:, None] + v_V[None, :], mask=there_T[:, None] & (v_V < F)[None, :], other=0.0)
        scale_TJ = tl.load(
            scales + scales_T[:, None] + j_J[None, :], mask=there_T[:, None] & (j_J < SCALES)[None, :], other=0
        )
        k_TX = tl.load(rope + rope_T[:, None] + x_X[None, :], mask=there_T[:, None], other=0.0).to(q_MV.dtype)
        if EXPONENTS:
            scale_TJ = (scale_TJ.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        c_TJY = tl.reshape(c_TV.to(tl.float32), (BLOCK_T, BLOCK_J, BLOCK_V // BLOCK_J)) * scale_TJ[:, :, None]
        c_TJY = c_TJY.to(q_MV.dtype)
        if F < BLOCK_V:  # then the last tile is free, and as long as the rotated part
            c_TJY = tl.where((j_J == SCALES)[None, :, None], k_TX[:, None, :], c_TJY)
        c_TV = tl.reshape(c_TJY, (BLOCK_T, BLOCK_V))
        acc_MV, m_M, l_M = attend(
            acc_MV, m_M, l_M, q_MV, q_MX, c_TV, k_TX, there_T[None, :], scale, HAS_TAIL=X > BLOCK_V
        )
    write_split(
        acc_MV, m_M, l_M, b, split, s_M, h_M, there_M, v_V, sink, ends, out, lse, part, part_lse, S, H, V, HAS_SINK
    )
