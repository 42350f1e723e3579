"""Indexer scores as an engine computes them: over windows of FP8 keys, or over a paged cache of them.

    L_st = κ_t · Σ_j w_sj · relu(q_sj · k_t)        for start_s ≤ t < end_s, −∞ elsewhere

κ_t ≥ 0 is the key's scale; that of a query is expected inside its weights. The formula is `index_scores`'; what differs
is the storage, a window per query, and that nothing is differentiated. Semantics and memory layouts are those of
DeepGEMM's `fp8_mqa_logits` and `fp8_paged_mqa_logits`.

S queries, T keys, J indexer heads, I dimensions of one; B sequences of N new tokens each, P pages of Y tokens, M at
most of a sequence, W columns, X = B · N.
"""

import torch
from torch import Tensor

from nautile.ops.checks import looks_at_values, same_device
from nautile.ops.dispatch import implementation
from nautile.ops.index_cache import index_planes
from nautile.ops.index_schedule import SPLIT

QUERIES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64)
OUTPUTS = (torch.float32, torch.bfloat16, torch.float64)
ROW_BYTES = 1024
"""Rows of logits begin at multiples of it."""


@torch.no_grad()
def mqa_logits(
    q_SJI: Tensor,
    k_TI: Tensor,
    weights_SJ: Tensor,
    start_S: Tensor,
    end_S: Tensor,
    k_scale_T: Tensor | None = None,
    *,
    clean: bool = True,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Logits of each query for the keys of its window.

    Args:
        q_SJI: Queries in FP8 (e4m3), bfloat16, float16, float32 or float64.
        k_TI: Keys of the same dtype. Those in nobody's window may hold anything.
        weights_SJ: float32 (float64 for float64 queries) weight of each head, of any sign.
        start_S: int32, first key of each query.
        end_S: int32, one past its last key. A window may be empty; what lies outside 0..T is cut off.
        k_scale_T: float32 scale of each key, not negative; None for 1.
        clean: Write −∞ outside the windows. Otherwise what stands there is whatever stood in memory.
        width: Give the compressed form: column c of row s is key start_s + c. At least the longest window.
        dtype: float32 or bfloat16 (float64 for float64 queries).

    Returns:
        [S, T], or [S, width]; rows begin at multiples of 1024 bytes, so it is a slice of a wider tensor.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or a window is longer than `width`.
    """
    S, J, width_q = q_SJI.shape if q_SJI.dim() == 3 else (0, 0, -1)
    T = k_TI.shape[0] if k_TI.dim() == 2 else -1
    if width_q < 0 or T < 0 or k_TI.shape[1] != width_q:
        raise ValueError(
            f"mqa_logits: q and k must be [S, J, I] and [T, I], got {list(q_SJI.shape)} and {list(k_TI.shape)}"
        )
    if q_SJI.dtype not in QUERIES or k_TI.dtype != q_SJI.dtype:
        raise ValueError(f"mqa_logits: q and k must share a floating dtype, got {q_SJI.dtype} and {k_TI.dtype}")
    _check_weights("mqa_logits", weights_SJ, (S, J), q_SJI.dtype, dtype)
    for name, bound_S in (("start", start_S), ("end", end_S)):
        if bound_S.shape != (S,) or bound_S.dtype != torch.int32:
            raise ValueError(f"mqa_logits: {name} must be int32 [S] = {[S]}, got {bound_S.dtype} {list(bound_S.shape)}")
    if k_scale_T is not None and (k_scale_T.shape != (T,) or k_scale_T.dtype != torch.float32):
        raise ValueError(
            f"mqa_logits: k_scale must be float32 [T] = {[T]}, got {k_scale_T.dtype} {list(k_scale_T.shape)}"
        )
    same_device("mqa_logits", q=q_SJI, k=k_TI, weights=weights_SJ, start=start_S, end=end_S, k_scale=k_scale_T)
    if width is not None and width < 1:
        raise ValueError(f"mqa_logits: width must be 1 or more, got {width}")
    if width is not None and S and looks_at_values(end_S):
        longest = int((end_S.long() - start_S.long()).max())
        if longest > width:
            raise ValueError(f"mqa_logits: a window of {longest} keys exceeds width {width}")
    out_SW = new_logits(S, T if width is None else width, dtype, q_SJI.device, spare=SPLIT if width is None else 0)
    run = implementation("mqa_logits", q_SJI)
    run(q_SJI, k_TI, weights_SJ, start_S, end_S, k_scale_T, out_SW, clean=clean, compressed=width is not None)
    return out_SW


@torch.no_grad()
def paged_mqa_logits(
    q_BNJI: Tensor,
    cache_PYZ: Tensor,
    weights_XJ: Tensor,
    lengths_BN: Tensor,
    pages_BM: Tensor,
    width: int,
    *,
    clean: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Logits of new tokens for the cached keys of their sequences.

    A page holds first the Y · I bytes of its keys, then Y float32 scales: its shape [Y, I + 4] says how long it is, not
    where a key lies. `index_planes` gives the two parts.

    Args:
        q_BNJI: FP8 (e4m3) queries of N new tokens per sequence.
        cache_PYZ: uint8 [P, Y, I + 4]; pages may lie apart (any stride of dimension 0 that is a multiple of 4). Pages
            that nobody names and keys beyond the lengths may hold anything.
        weights_XJ: float32 weight of each head, the query's scale included.
        lengths_BN: int32, how many keys each new token sees, at most `width`; 0 for none.
        pages_BM: int32 page numbers of each sequence, in order; read only as far as the lengths reach.
        width: Columns wanted.
        clean: Write −∞ at and beyond the lengths. Otherwise what stands there is whatever stood in memory.
        dtype: float32 or bfloat16.

    Returns:
        [B · N, width], row b · N + n; rows begin at multiples of 1024 bytes.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, a length exceeds the width or the pages, or a page
            is not there.
    """
    B, N, J, I = q_BNJI.shape if q_BNJI.dim() == 4 else (0, 0, 0, -1)  # noqa: E741
    if I < 0 or q_BNJI.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"paged_mqa_logits: q must be float8_e4m3fn [B, N, J, I], got {q_BNJI.dtype} {list(q_BNJI.shape)}"
        )
    index_planes(cache_PYZ, I)
    _check_weights("paged_mqa_logits", weights_XJ, (B * N, J), q_BNJI.dtype, dtype)
    if lengths_BN.shape != (B, N) or lengths_BN.dtype != torch.int32:
        raise ValueError(
            f"paged_mqa_logits: lengths must be int32 [B, N] = {[B, N]}, got {lengths_BN.dtype} "
            f"{list(lengths_BN.shape)}"
        )
    if pages_BM.dim() != 2 or pages_BM.shape[0] != B or pages_BM.dtype != torch.int32:
        raise ValueError(
            f"paged_mqa_logits: pages must be int32 [B, M] with B = {B}, got {pages_BM.dtype} {list(pages_BM.shape)}"
        )
    if width < 1:
        raise ValueError(f"paged_mqa_logits: width must be 1 or more, got {width}")
    same_device("paged_mqa_logits", q=q_BNJI, cache=cache_PYZ, weights=weights_XJ, lengths=lengths_BN, pages=pages_BM)
    if looks_at_values(lengths_BN) and lengths_BN.numel():
        _check_pages(cache_PYZ, lengths_BN, pages_BM, width)
    out_XW = new_logits(B * N, width, dtype, q_BNJI.device)
    run = implementation("paged_mqa_logits", q_BNJI)
    run(q_BNJI, cache_PYZ, weights_XJ, lengths_BN, pages_BM, out_XW, clean=clean)
    return out_XW


def new_logits(rows: int, columns: int, dtype: torch.dtype, device: torch.device, spare: int = 0) -> Tensor:
    """Uninitialised [rows, columns] whose row stride is a multiple of 1024 bytes and of `SPLIT` columns."""
    whole = columns + spare if spare else -(-columns // SPLIT) * SPLIT
    step = ROW_BYTES // dtype.itemsize
    return torch.empty(rows, -(-whole // step) * step, dtype=dtype, device=device)[:, :columns]


def _check_weights(op: str, weights: Tensor, shape: tuple[int, int], q: torch.dtype, out: torch.dtype) -> None:
    wide = torch.float64 if q == torch.float64 else torch.float32
    if weights.shape != shape or weights.dtype != wide:
        raise ValueError(
            f"{op}: weights must be {wide} {list(shape)}, got {weights.dtype} {list(weights.shape)}".replace(
                "torch.", ""
            )
        )
    if out not in OUTPUTS or (out == torch.float64) != (q == torch.float64):
        raise ValueError(f"{op}: dtype must be float32 or bfloat16 (float64 for float64 queries), got {out} for {q}")


def _check_pages(cache_PYZ: Tensor, lengths_BN: Tensor, pages_BM: Tensor, width: int) -> None:
    longest = lengths_BN.amax(1)
    page = cache_PYZ.shape[1]
    if int(longest.max()) > min(width, pages_BM.shape[1] * page) or int(lengths_BN.min()) < 0:
        raise ValueError(
            f"paged_mqa_logits: lengths must lie in 0..{min(width, pages_BM.shape[1] * page)} (width {width}, "
            f"{pages_BM.shape[1]} pages of {page}), got {int(lengths_BN.min())}..{int(longest.max())}"
        )
    read = torch.arange(pages_BM.shape[1], device=pages_BM.device) * page < longest[:, None]
    wrong = read & ((pages_BM < 0) | (pages_BM >= cache_PYZ.shape[0]))
    if wrong.any():
        raise ValueError(
            f"paged_mqa_logits: page {int(pages_BM[wrong][0])} is not one of the cache's {cache_PYZ.shape[0]}"
        )
