"""FlashMLA's interface on `nautile.ops`: decoding over paged latents, dense or sparse, and sparse prefill.

Names, arguments, layouts and limits are those of its SM90 kernels, so code that runs here runs there. What FlashMLA has
for SM100 only says so. b requests, s_q new tokens, h_q heads, d dimensions of a latent.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from nautile import ops
from nautile.compat.device import multiprocessors
from nautile.ops.split_kv import dense_parts
from nautile.ops.split_plan import Splits, plan_splits

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

HEAD_DIMS = (576, 512)
VALUE_DIM = 512
PAGE = 64
"""Tokens of a page of the dense cache."""


class FlashMLAError(ValueError, RuntimeError):
    """Arguments that FlashMLA's SM90 kernels do not take; FlashMLA itself raises `RuntimeError` or `AssertionError`."""


@dataclass(frozen=True)
class Config:
    """What must stay the same between the calls that share a schedule."""

    b: int
    s_q: int
    h_q: int
    page_block_size: int
    h_k: int
    causal: bool
    is_fp8_kvcache: bool
    topk: int | None
    extra_page_block_size: int | None
    extra_topk: int | None


@dataclass
class FlashMLASchedMeta:
    """How a decoding call is shared out among multiprocessors: filled by the first call, reused by those after it.

    It may be shared by calls of the same shapes and the same *values* of the lengths: the layers of one step.
    """

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: Tensor | None = None
    """int32 [b + parts, 3]: request, first and last block + 1 of each split; dense decoding only."""
    num_splits: Tensor | None = None
    """int32 [b + 1], sums of splits per request; dense decoding only."""
    splits: Splits | None = None
    """Both, as `nautile.ops` takes them."""


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """An empty schedule, and None where the number of splits once was. Arguments are ignored."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens to all rows of a paged cache, or with `indices` to chosen rows of an FP8 one.

    Args:
        q: bfloat16 (dense: or float16) [b, s_q, h_q, d], d 576 or 512.
        k_cache: Dense: q's dtype [pages, 64, h_k, d]. Sparse: bytes (float8_e4m3fn, int8, uint8) [pages, p, 1, 656 or
            584], in the layouts of `nautile.ops.latent_bytes`.
        block_table: Dense: int32 [b, pages of a request]. Sparse: unused.
        cache_seqlens: Dense: int32 [b]. Sparse: unused.
        head_dim_v: 512.
        tile_scheduler_metadata: From `get_mla_metadata`.
        num_splits: None.
        softmax_scale: d**-0.5 by default.
        causal: Dense only: the queries are the last s_q tokens.
        is_fp8_kvcache: True for sparse, False for dense attention.
        indices: int32 [b, s_q, topk], topk a multiple of 64: page · p + place; −1 or out of range for none.
        attn_sink: Sparse: float32 [h_q]. ``out ← out · exp(lse) / (exp(lse) + exp(sink))``.
        extra_k_cache: Second sparse cache, in the layout of 584 bytes only.
        extra_indices_in_kvcache: Choices from it.
        topk_length: int32 [b]: how many of `indices` count; in the layout of 584 bytes only.
        extra_topk_length: The same of the second cache.

    Returns:
        out [b, s_q, h_q, 512] in q's dtype; lse float32 [b, h_q, s_q], natural logarithm. A query that sees nothing
        has out 0 and lse +∞.

    Raises:
        FlashMLAError: Arguments do not fit together, or differ from those that the schedule was made for.
        ValueError: The same, found by `nautile.ops`.
    """
    meta = tile_scheduler_metadata
    if not isinstance(meta, FlashMLASchedMeta):
        raise FlashMLAError(
            f"tile_scheduler_metadata must be what get_mla_metadata() returns first, got {type(meta).__name__}"
        )
    _need(num_splits is None, "num_splits must be None: it is part of the schedule")
    _need(
        q.dim() == 4 and k_cache.dim() == 4,
        f"want q [b, s_q, h_q, d] and k_cache with 4 dimensions, got {_of(q)}, {_of(k_cache)}",
    )
    _need(q.shape[3] in HEAD_DIMS, f"q must have {HEAD_DIMS} dimensions, got {_of(q)}")
    _need(head_dim_v == VALUE_DIM, f"head_dim_v must be {VALUE_DIM}, got {head_dim_v}")
    _need(q.shape[0] > 0, "q must hold a request, got batch size 0")
    _check_schedule(
        meta,
        Config(
            b=q.shape[0],
            s_q=q.shape[1],
            h_q=q.shape[2],
            page_block_size=k_cache.shape[1],
            h_k=k_cache.shape[2],
            causal=causal,
            is_fp8_kvcache=is_fp8_kvcache,
            topk=None if indices is None else indices.shape[-1],
            extra_page_block_size=None if extra_k_cache is None else extra_k_cache.shape[1],
            extra_topk=None if extra_indices_in_kvcache is None else extra_indices_in_kvcache.shape[-1],
        ),
    )
    if indices is not None:
        _need(not causal, "causal must be False with indices: they say what each token sees")
        extra = (extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length)
        return _sparse(q, k_cache, indices, is_fp8_kvcache, softmax_scale, attn_sink, *extra)
    others = (attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length)
    _need(all(x is None for x in others), "attn_sink, extra_* and topk_length belong to sparse attention: give indices")
    _need(block_table is not None and cache_seqlens is not None, "dense attention needs block_table and cache_seqlens")
    assert block_table is not None and cache_seqlens is not None
    _need(not is_fp8_kvcache, "an FP8 cache is for sparse attention: give indices")
    _need(q.dtype in (torch.bfloat16, torch.float16), f"q must be bfloat16 or float16, got {q.dtype}")
    _need(k_cache.shape[1] == PAGE, f"a page must hold {PAGE} tokens, got {_of(k_cache)}")
    _need(q.shape[2] % k_cache.shape[2] == 0, f"h_q {q.shape[2]} must be a multiple of h_k {k_cache.shape[2]}")
    if meta.splits is None:
        _plan(meta, q, k_cache, cache_seqlens)
    scale = softmax_scale if softmax_scale is not None else q.shape[3] ** -0.5
    return ops.paged_mla_decode(q, k_cache, block_table, cache_seqlens, head_dim_v, scale, causal, splits=meta.splits)


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a prompt's tokens to the rows that each one names; differentiable in q and kv, unlike FlashMLA's.

    Args:
        q: bfloat16 [s_q, h_q, d], h_q a multiple of 64, d 576 or 512.
        kv: bfloat16 [s_kv, 1, d].
        indices: int32 [s_q, 1, topk], topk a multiple of 128; −1 or any number that is no row for none.
        sm_scale: Factor on the scores.
        d_v: 512.
        attn_sink: float32 [h_q].
        topk_length: int32 [s_q]: how many of the indices count.

    Returns:
        out bfloat16 [s_q, h_q, 512], max_logits and lse float32 [s_q, h_q], natural logarithm. A query without rows
        has out 0, max_logits −∞, lse +∞.

    Raises:
        FlashMLAError: Arguments do not fit together.
        ValueError: The same, found by `nautile.ops`.
    """
    _need(q.dim() == 3 and q.shape[2] in HEAD_DIMS, f"q must be [s_q, h_q, 576 or 512], got {_of(q)}")
    _need(kv.dim() == 3 and kv.shape[1:] == (1, q.shape[2]), f"kv must be [s_kv, 1, {q.shape[2]}], got {_of(kv)}")
    _need(q.dtype == kv.dtype == torch.bfloat16, f"q and kv must be bfloat16, got {q.dtype} and {kv.dtype}")
    _need(q.shape[1] % 64 == 0, f"h_q must be a multiple of 64 on SM90, got {q.shape[1]}")
    _need(d_v == VALUE_DIM, f"d_v must be {VALUE_DIM}, got {d_v}")
    _need(
        indices.dim() == 3 and indices.shape[:2] == (q.shape[0], 1) and indices.dtype == torch.int32,
        f"indices must be int32 [s_q, 1, topk] for s_q = {q.shape[0]}, got {indices.dtype} {_of(indices)}",
    )
    _need(indices.shape[2] % 128 == 0, f"topk must be a multiple of 128 on SM90, got {indices.shape[2]}")
    return ops.sparse_mla_prefill(q, kv[:, 0], indices[:, 0], sm_scale, d_v, attn_sink, topk_length)


def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> NoReturn:
    """Only on SM100; `nautile.ops.causal_attention` trains with heads of 192 and 128 dimensions on any device.

    Raises:
        NotImplementedError: Always.
    """
    _sm100_only("flash_attn_varlen_func")


def flash_attn_varlen_qkvpacked_func(*args: Any, **kwargs: Any) -> NoReturn:
    """Only on SM100.

    Raises:
        NotImplementedError: Always.
    """
    _sm100_only("flash_attn_varlen_qkvpacked_func")


def flash_attn_varlen_kvpacked_func(*args: Any, **kwargs: Any) -> NoReturn:
    """Only on SM100.

    Raises:
        NotImplementedError: Always.
    """
    _sm100_only("flash_attn_varlen_kvpacked_func")


def _sparse(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    is_fp8: bool,
    scale: float | None,
    sink: Tensor | None,
    extra_cache: Tensor | None,
    extra_indices: Tensor | None,
    lengths: Tensor | None,
    extra_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _need(is_fp8, "sparse attention reads an FP8 cache: is_fp8_kvcache must be True")
    _need(q.dtype == torch.bfloat16, f"q must be bfloat16, got {q.dtype}")
    _need(q.shape[2] in (64, 128), f"sparse attention takes 64 or 128 heads on SM90, got {q.shape[2]}")
    _need(k_cache.shape[2] == 1, f"sparse attention has one latent head, got {k_cache.shape[2]}")
    for x in (indices, extra_indices):
        _need(x is None or x.shape[-1] % 64 == 0, f"topk must be a multiple of 64, got {None if x is None else _of(x)}")
    _need(
        q.shape[3] == 512 or all(x is None for x in (extra_cache, lengths, extra_lengths)),
        "topk_length and a second cache are for latents of 512 dimensions (584 bytes) on SM90",
    )
    if extra_cache is not None:
        _need(
            extra_cache.dim() == 4 and extra_cache.shape[2] == 1,
            f"extra_k_cache must be like k_cache, got {_of(extra_cache)}",
        )
    return ops.paged_sparse_mla_decode(
        q,
        k_cache[:, :, 0],
        indices,
        scale,
        VALUE_DIM,
        sink_H=sink,
        lengths_B=lengths,
        extra_cache_NPZ=None if extra_cache is None else extra_cache[:, :, 0],
        extra_rows_BSK=extra_indices,
        extra_lengths_B=extra_lengths,
    )


def _plan(meta: FlashMLASchedMeta, q: Tensor, k_cache: Tensor, lengths: Tensor) -> None:
    """Fill the schedule, without waiting for a device."""
    _, s_q, h_q, _ = q.shape
    parts = dense_parts(multiprocessors(q.device), s_q, h_q, k_cache.shape[2])
    meta.splits = plan_splits(lengths, parts)
    meta.tile_scheduler_metadata, meta.num_splits = meta.splits.table_R3, meta.splits.ends_B


def _check_schedule(meta: FlashMLASchedMeta, config: Config) -> None:
    if not meta.have_initialized:
        meta.have_initialized, meta.config = True, config
        return
    assert meta.config is not None
    for name, had in vars(meta.config).items():
        has = getattr(config, name)
        _need(had == has, f"the schedule was made for {name} = {had}, got {has}; get_mla_metadata() gives a new one")


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise FlashMLAError(otherwise)


def _of(x: Tensor) -> str:
    return str(list(x.shape))


def _sm100_only(name: str) -> NoReturn:
    raise NotImplementedError(f"{name} needs SM100 tensor cores; nautile has FlashMLA's SM90 set")
