"""Indexer logits on a GPU: a program holds a few queries and walks along the keys that they see.

B sequences of N new tokens, S queries, T keys, J heads, I dimensions, Y tokens of a page, W columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nautile.ops.index_cache import index_planes
from nautile.ops.triton import support
from nautile.ops.triton.index_tiles import load_keys, load_queries, load_weights, scoring, weighted

CHUNK = 2048
"""Keys of one program of the windowed form."""
PAGED_CHUNK = 512
"""Keys of one program of the paged form, where there are few queries to fill a GPU with."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """FP8 where the device has it, and the usual floats."""
    return support.fp8(device, dtype) if dtype == torch.float8_e4m3fn else support.floats(device, dtype)


def mqa_logits(
    q_SJI: Tensor,
    k_TI: Tensor,
    weights_SJ: Tensor,
    start_S: Tensor,
    end_S: Tensor,
    k_scale_T: Tensor | None,
    out_SW: Tensor,
    *,
    clean: bool,
    compressed: bool,
) -> None:
    """See `nautile.ops.mqa_logits`."""
    S, J, width = q_SJI.shape
    T, W = k_TI.shape[0], out_SW.shape[1]
    if S == 0 or W == 0:
        return
    tile, launch = scoring(J, width, q_SJI.element_size())
    scale = weights_SJ if k_scale_T is None else k_scale_T.contiguous()
    mqa_logits_kernel[(triton.cdiv(S, tile.queries), triton.cdiv(max(T, W), CHUNK))](
        q_SJI.contiguous(), k_TI.contiguous(), weights_SJ.contiguous(), scale, start_S.contiguous(), end_S.contiguous(),
        out_SW, S, T, J, width, W, out_SW.stride(0), CHUNK,
        HAS_SCALE=k_scale_T is not None, CLEAN=clean, COMPRESSED=compressed,
        BLOCK_S=tile.queries, BLOCK_T=tile.keys, BLOCK_J=tile.heads, BLOCK_I=tile.width, **launch,
    )  # fmt: skip


def paged_mqa_logits(
    q_BNJI: Tensor,
    cache_PYZ: Tensor,
    weights_XJ: Tensor,
    lengths_BN: Tensor,
    pages_BM: Tensor,
    out_XW: Tensor,
    *,
    clean: bool,
) -> None:
    """See `nautile.ops.paged_mqa_logits`."""
    B, N, J, width = q_BNJI.shape
    if B * N == 0:
        return
    keys_PYI, scales_PY = index_planes(cache_PYZ, width)
    tile, launch = scoring(J, width, q_BNJI.element_size())
    grid = (triton.cdiv(N, tile.queries), triton.cdiv(out_XW.shape[1], PAGED_CHUNK), B)
    paged_mqa_logits_kernel[grid](
        q_BNJI.contiguous(), keys_PYI, scales_PY, weights_XJ.contiguous(), lengths_BN.contiguous(), pages_BM,
        out_XW, N, J, width, cache_PYZ.shape[1], out_XW.shape[1],
        keys_PYI.stride(0), scales_PY.stride(0), pages_BM.stride(0), pages_BM.stride(1), out_XW.stride(0), PAGED_CHUNK,
        CLEAN=clean, BLOCK_N=tile.queries, BLOCK_T=tile.keys, BLOCK_J=tile.heads, BLOCK_I=tile.width, **launch,
    )  # fmt: skip


@triton.jit
def mqa_logits_kernel(
    q, k, weights, scale, start, end, out,
    S, T, J, I, W, stride_out, chunk,  # noqa: E741
    HAS_SCALE: tl.constexpr, CLEAN: tl.constexpr, COMPRESSED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Program (a, c): queries from a · BLOCK_S on, the c-th `chunk` keys of what they see together."""
    s = tl.program_id(0) * BLOCK_S
    row_S = s + tl.arange(0, BLOCK_S)
    first_S = tl.load(start + row_S, mask=row_S < S, other=T)
    first_S = tl.minimum(tl.maximum(first_S, -W), T)  # what is added to or taken from it below must not overflow
    last_S = tl.minimum(tl.load(end + row_S, mask=row_S < S, other=0), T)
    out_S = out + row_S.to(tl.int64) * stride_out
    rows_TS = (row_S < S)[None, :]
    if CLEAN:
        for c in range(tl.program_id(1) * chunk, tl.minimum((tl.program_id(1) + 1) * chunk, W), BLOCK_T):
            column_T = c + tl.arange(0, BLOCK_T)
            key_TS = column_T[:, None] + (first_S[None, :] if COMPRESSED else 0)
            inside_TS = (key_TS >= first_S[None, :]) & (key_TS < last_S[None, :]) & (key_TS >= 0)
            blank_TS = tl.full((BLOCK_T, BLOCK_S), float("-inf"), tl.float32).to(out.dtype.element_ty)
            outside_TS = rows_TS & (column_T < W)[:, None] & (inside_TS == 0)
            tl.store(out_S[None, :] + column_T[:, None], blank_TS, mask=outside_TS)
    begin = tl.maximum(tl.min(first_S), 0) + tl.program_id(1) * chunk
    stop = tl.minimum(tl.max(last_S), begin + chunk)
    q_XI = load_queries(q, s, S, J, I, BLOCK_S, BLOCK_J, BLOCK_I)
    w_X = load_weights(weights, s, S, J, BLOCK_S, BLOCK_J)
    for t in range(begin, stop, BLOCK_T):
        key_T = t + tl.arange(0, BLOCK_T)
        logits_TS = weighted(load_keys(k, t, stop, I, BLOCK_T, BLOCK_I), q_XI, w_X, BLOCK_T, BLOCK_S, BLOCK_J)
        if HAS_SCALE:
            logits_TS *= tl.load(scale + key_T, mask=key_T < stop, other=0.0)[:, None]
        inside_TS = rows_TS & (key_T < stop)[:, None]
        inside_TS &= (key_T[:, None] >= first_S[None, :]) & (key_T[:, None] < last_S[None, :])
        column_TS = key_T[:, None] - (first_S[None, :] if COMPRESSED else 0)
        tl.store(out_S[None, :] + column_TS, logits_TS.to(out.dtype.element_ty), mask=inside_TS & (column_TS < W))


@triton.jit
def paged_mqa_logits_kernel(
    q, keys, scales, weights, lengths, pages, out,
    N, J, I, Y, W, stride_keys, stride_scales, stride_pages, step_pages, stride_out, chunk,  # noqa: E741
    CLEAN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Program (a, c, b): new tokens of sequence b from a · BLOCK_N on, the c-th `chunk` of its keys."""
    n, b = tl.program_id(0) * BLOCK_N, tl.program_id(2)
    token_N = n + tl.arange(0, BLOCK_N)
    length_N = tl.load(lengths + b * N + token_N, mask=token_N < N, other=0)
    length_N = tl.minimum(length_N, W)
    out_N = out + (b * N + token_N).to(tl.int64) * stride_out
    begin = tl.program_id(1) * chunk
    stop = tl.minimum(tl.max(length_N), begin + chunk)
    i = tl.arange(0, BLOCK_I)
    q_XI = load_queries(q + b.to(tl.int64) * N * J * I, n, N, J, I, BLOCK_N, BLOCK_J, BLOCK_I)
    w_X = load_weights(weights + b.to(tl.int64) * N * J, n, N, J, BLOCK_N, BLOCK_J)
    for t in range(begin, stop, BLOCK_T):
        key_T = t + tl.arange(0, BLOCK_T)
        there_T = key_T < stop
        page_T = tl.load(pages + b.to(tl.int64) * stride_pages + key_T // Y * step_pages, mask=there_T, other=0)
        page_T, place_T = page_T.to(tl.int64), key_T % Y
        key_TI = (page_T * stride_keys + place_T * I)[:, None] + i[None, :]
        k_TI = tl.load(keys + key_TI, mask=there_T[:, None] & (i < I)[None, :], other=0.0)
        logits_TN = weighted(k_TI, q_XI, w_X, BLOCK_T, BLOCK_N, BLOCK_J)
        logits_TN *= tl.load(scales + page_T * stride_scales + place_T, mask=there_T, other=0.0)[:, None]
        inside_TN = (token_N < N)[None, :] & (key_T[:, None] < length_N[None, :])
        tl.store(out_N[None, :] + key_T[:, None], logits_TN.to(out.dtype.element_ty), mask=inside_TN & there_T[:, None])
    if CLEAN:
        for t in range(begin, tl.minimum(begin + chunk, W), BLOCK_T):
            column_T = t + tl.arange(0, BLOCK_T)
            mine_T = column_T < tl.minimum(begin + chunk, W)
            outside_TN = (token_N < N)[None, :] & mine_T[:, None] & (column_T[:, None] >= length_N[None, :])
            blank_TN = tl.full((BLOCK_T, BLOCK_N), float("-inf"), tl.float32).to(out.dtype.element_ty)
            tl.store(out_N[None, :] + column_T[:, None], blank_TN, mask=outside_TN)
