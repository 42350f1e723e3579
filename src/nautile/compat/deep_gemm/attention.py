"""DeepGEMM's indexer logits on `nautile.ops.mqa_logits` and `paged_mqa_logits`."""

import torch
from torch import Tensor

from nautile import ops
from nautile.compat.deep_gemm import settings
from nautile.compat.deep_gemm.errors import need, sm100_only
from nautile.ops.index_schedule import paged_schedule

HEADS = (32, 64)
WIDTHS = (32, 64, 128)
PAGE = 64
"""Tokens of a page of the cache on SM90."""
DTYPES = (torch.float32, torch.bfloat16)


def fp8_fp4_mqa_logits(
    q: tuple[Tensor, Tensor | None],
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``out_st = κ_t Σ_h w_sh · relu(q_sh · k_t)`` for start_s ≤ t < end_s.

    Args:
        q: (float8_e4m3fn [S, H, D], None); the queries' scales belong into `weights`. H is 32 or 64, D 32, 64 or 128.
        kv: (float8_e4m3fn [T, D], float32 scales [T]).
        weights: float32 [S, H].
        cu_seq_len_k_start: int32 [S].
        cu_seq_len_k_end: int32 [S].
        clean_logits: −∞ outside of the windows; else anything may stand there.
        max_seqlen_k: If not 0, column c of row s is key start_s + c, and so many columns are returned.
        logits_dtype: float32 or bfloat16.

    Returns:
        [S, T] or [S, max_seqlen_k]; rows begin at multiples of 1024 bytes.

    Raises:
        DeepGemmError: Operands do not fit together.
        NotOnHopperError: They are FP4.
    """
    name = "fp8_mqa_logits"
    (data, q_scale), (keys, key_scale) = q, kv
    if q_scale is not None:
        sm100_only(name, "FP4 queries")
    need(data.dim() == 3 and data.is_contiguous(), name, f"q must be contiguous [S, H, D], got {list(data.shape)}")
    S, H, D = data.shape
    _check_queries(name, data, weights, S, H, D)
    need(keys.dim() == 2 and keys.is_contiguous(), name, f"kv must be contiguous [T, D], got {list(keys.shape)}")
    need(keys.dtype == torch.float8_e4m3fn, name, f"kv must be float8_e4m3fn, got {keys.dtype}")
    need(keys.shape[1] == D, name, f"kv must be [T, {D}], got {list(keys.shape)}")
    need(
        key_scale.dtype == torch.float32 and key_scale.shape == keys.shape[:1],
        name,
        f"scales of kv must be float32 [{len(keys)}], got {key_scale.dtype} {list(key_scale.shape)}",
    )
    _check_logits(name, logits_dtype)
    need(not (max_seqlen_k and clean_logits), name, "the compressed form (max_seqlen_k > 0) is not cleaned")
    return ops.mqa_logits(
        data,
        keys,
        weights,
        cu_seq_len_k_start,
        cu_seq_len_k_end,
        key_scale,
        clean=clean_logits,
        width=max_seqlen_k or None,
        dtype=logits_dtype,
    )


def fp8_mqa_logits(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
) -> Tensor:
    """`fp8_fp4_mqa_logits` as it was called before FP4: float32 logits of FP8 queries."""
    return fp8_fp4_mqa_logits((q, None), kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k)


def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None = None
) -> Tensor:
    """int32 [num_sms + 1, 2]: where each multiprocessor begins with a paged call.

    Args:
        context_lens: int32 [B, N]: keys that each new token sees.
        block_kv: Tokens of a page, 64.
        num_sms: Between how many the work is divided.
        indices: Must be None on SM90.

    Raises:
        DeepGemmError: Arguments of another kind.
        NotOnHopperError: `indices` are given.
    """
    name = "get_paged_mqa_logits_metadata"
    if indices is not None:
        sm100_only(name, "a call with indices")
    _check_lengths(name, context_lens)
    need(block_kv == PAGE, name, f"a page must hold {PAGE} tokens on SM90, got {block_kv}")
    lengths, new_tokens = context_lens[:, -1].tolist(), context_lens.shape[1]
    schedule = paged_schedule(lengths, new_tokens, num_sms)
    return torch.tensor(schedule, dtype=torch.int32, device=context_lens.device)


def fp8_fp4_paged_mqa_logits(
    q: tuple[Tensor, Tensor | None],
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor,
    max_context_len: int,
    clean_logits: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    indices: Tensor | None = None,
) -> Tensor:
    """The same over a paged cache, for N new tokens of each of B sequences.

    Args:
        q: (float8_e4m3fn [B, N, H, D], None).
        kv_cache: uint8 [pages, 64, 1, D + 4]; of a page, first all 64 · D numbers, then the 64 float32 scales.
        weights: float32 [B · N, H].
        context_lens: int32 [B, N]: keys that each new token sees.
        block_table: int32 [B, pages of a sequence]. Entries past a sequence's length may be anything.
        schedule_meta: From `get_paged_mqa_logits_metadata`.
        max_context_len: Columns of the result.
        clean_logits: Must be False.
        logits_dtype: float32 or bfloat16.
        indices: Must be None on SM90.

    Returns:
        [B · N, max_context_len]; what stands at or past a token's length is anything.

    Raises:
        DeepGemmError: Operands do not fit together.
        NotOnHopperError: They are FP4, or `indices` are given.
    """
    name = "fp8_paged_mqa_logits"
    data, q_scale = q
    if q_scale is not None:
        sm100_only(name, "FP4 queries")
    if indices is not None:
        sm100_only(name, "a call with indices")
    need(data.dim() == 4 and data.is_contiguous(), name, f"q must be contiguous [B, N, H, D], got {list(data.shape)}")
    B, N, H, D = data.shape
    _check_queries(name, data, weights, B * N, H, D)
    need(
        kv_cache.dtype == torch.uint8 and list(kv_cache.shape[1:]) == [PAGE, 1, D + 4],
        name,
        f"kv_cache must be uint8 [pages, {PAGE}, 1, {D + 4}], got {kv_cache.dtype} {list(kv_cache.shape)}",
    )
    _check_lengths(name, context_lens)
    need(list(context_lens.shape) == [B, N], name, f"context_lens must be {[B, N]}, got {list(context_lens.shape)}")
    need(
        schedule_meta.dtype == torch.int32 and list(schedule_meta.shape) == [settings.get_num_sms() + 1, 2],
        name,
        f"schedule_meta must be int32 {[settings.get_num_sms() + 1, 2]}, for get_num_sms() multiprocessors, "
        f"got {schedule_meta.dtype} {list(schedule_meta.shape)}",
    )
    need(not clean_logits, name, "clean_logits must be False: lengths per token are not cleaned")
    _check_logits(name, logits_dtype)
    return ops.paged_mqa_logits(
        data, kv_cache[:, :, 0], weights, context_lens, block_table, max_context_len, clean=False, dtype=logits_dtype
    )


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor,
    max_context_len: int,
    clean_logits: bool = False,
    indices: Tensor | None = None,
) -> Tensor:
    """`fp8_fp4_paged_mqa_logits` as it was called before FP4: float32 logits of FP8 queries."""
    return fp8_fp4_paged_mqa_logits(
        (q, None),
        kv_cache,
        weights,
        context_lens,
        block_table,
        schedule_meta,
        max_context_len,
        clean_logits,
        indices=indices,
    )


def _check_queries(name: str, q: Tensor, weights: Tensor, rows: int, H: int, D: int) -> None:
    need(q.dtype == torch.float8_e4m3fn, name, f"q must be float8_e4m3fn, got {q.dtype}")
    need(H in HEADS and D in WIDTHS, name, f"SM90 takes {HEADS} heads of {WIDTHS} dimensions, got {H} of {D}")
    need(
        weights.dtype == torch.float32 and list(weights.shape) == [rows, H] and weights.stride(1) == 1,
        name,
        f"weights must be float32 {[rows, H]}, contiguous per row, got {weights.dtype} {list(weights.shape)}",
    )


def _check_lengths(name: str, lengths: Tensor) -> None:
    need(
        lengths.dtype == torch.int32 and lengths.dim() == 2 and lengths.is_contiguous(),
        name,
        f"context_lens must be contiguous int32 [B, N], got {lengths.dtype} {list(lengths.shape)}",
    )


def _check_logits(name: str, dtype: torch.dtype) -> None:
    need(dtype in DTYPES, name, f"logits must be float32 or bfloat16, got {dtype}")
