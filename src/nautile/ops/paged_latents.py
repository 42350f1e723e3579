"""Attention of a few new tokens to a paged cache of latents, whose rows are key and value at once (absorbed MLA).

    s_ht = scale · q_h·x_t,   lse_h = log Σ_t exp s_ht,   o_h = Σ_t exp(s_ht − lse_h) x_t[: V]

over the rows t that a query sees: all of its request's (`paged_mla_decode`) or those chosen for it
(`paged_sparse_mla_decode`). A query that sees nothing has o = 0 and lse = +∞. Logarithms are natural. Semantics are
those of FlashMLA's decoding kernels, at any sizes; there is no backward.

B requests of S queries, H heads, G latent heads (1 in MLA), X = latent + rope dimensions, the first V of which are the
value, N pages of P places, W pages of a request, K chosen rows.
"""

import torch
from torch import Tensor

from nautile.ops.checks import looks_at_values, same_device
from nautile.ops.dispatch import implementation
from nautile.ops.latent_layout import MOST_VALUES, LatentLayout, layout_of
from nautile.ops.split_kv import Splits


def paged_mla_decode(
    q_BSHX: Tensor,
    cache_NPGX: Tensor,
    block_table_BW: Tensor,
    lengths_B: Tensor,
    v_dim: int = 512,
    scale: float | None = None,
    causal: bool = False,
    splits: Splits | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to all rows of a request, which are rows 0 … length − 1 of its pages.

    Nothing else of the cache and of the block table is read: it may hold anything.

    Args:
        q_BSHX: Queries with W_UK folded in, then their rotated part; any float.
        cache_NPGX: Latents of q's dtype, [N, P, G, X] or, for G = 1, [N, P, X]; head h reads latent head h // (H / G).
        block_table_BW: int32 pages of each request.
        lengths_B: int32 in [0, W · P]: rows of each request, its S new ones included.
        v_dim: V, at most X.
        scale: Factor on the scores; X**-0.5 by default.
        causal: The queries are the last S tokens, and see none after themselves: query s sees length − S + 1 + s rows.
        splits: How the work is shared out on a GPU, from `plan_splits` for the same lengths; made here otherwise.

    Returns:
        o_BSHV in q's dtype, lse_BHS in float32 (float64 for float64).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together; a length or a page that is needed is out of range;
            a gradient would be lost.
    """
    op = "paged_mla_decode"
    if cache_NPGX.dim() == 3:
        cache_NPGX = cache_NPGX.unsqueeze(2)
    B, _, H, X = _checked_queries(op, q_BSHX)
    N, P, G = cache_NPGX.shape[:3] if cache_NPGX.dim() == 4 else (0, 0, 0)
    if cache_NPGX.shape != (N, P, G, X) or P == 0 or G == 0 or H % G:
        raise ValueError(
            f"{op}: q and cache must be [B, S, H, X] and [N, P, G, X] (or [N, P, X]) with H a multiple of G and P at "
            f"least 1, got {list(q_BSHX.shape)} and {list(cache_NPGX.shape)}"
        )
    if cache_NPGX.dtype != q_BSHX.dtype or cache_NPGX.stride(-1) != 1:
        raise ValueError(
            f"{op}: cache must have q's dtype and its last dimension without gaps, got {cache_NPGX.dtype} of strides "
            f"{cache_NPGX.stride()} for q in {q_BSHX.dtype}"
        )
    if not 0 < v_dim <= X:
        raise ValueError(f"{op}: v_dim must be in [1, X] = [1, {X}], got {v_dim}")
    if block_table_BW.dim() != 2 or block_table_BW.shape[0] != B or block_table_BW.dtype != torch.int32:
        raise ValueError(
            f"{op}: block_table must be int32 [B, W] with B = {B}, got {block_table_BW.dtype} "
            f"{list(block_table_BW.shape)}"
        )
    _checked_lengths(op, "lengths", lengths_B, B, block_table_BW.shape[1] * P)
    same_device(op, q=q_BSHX, cache=cache_NPGX, block_table=block_table_BW, lengths=lengths_B)
    if looks_at_values(q_BSHX):
        needed_BW = torch.arange(0, block_table_BW.shape[1] * P, P, device=q_BSHX.device) < lengths_B[:, None]
        wild = needed_BW & ((block_table_BW < 0) | (block_table_BW >= N))
        if wild.any():
            b, w = wild.nonzero()[0].tolist()
            raise ValueError(f"{op}: block_table must name pages in [0, {N}), got {block_table_BW[b, w]} at {[b, w]}")
    _checked_splits(op, splits, q_BSHX)
    scale = X**-0.5 if scale is None else scale
    run = implementation(op, q_BSHX)
    return run(q_BSHX, cache_NPGX, block_table_BW, lengths_B, v_dim, scale, causal, splits)


def paged_sparse_mla_decode(
    q_BSHX: Tensor,
    cache_NPZ: Tensor,
    rows_BSK: Tensor,
    scale: float | None = None,
    v_dim: int = 512,
    *,
    sink_H: Tensor | None = None,
    lengths_B: Tensor | None = None,
    extra_cache_NPZ: Tensor | None = None,
    extra_rows_BSK: Tensor | None = None,
    extra_lengths_B: Tensor | None = None,
    splits: Splits | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to chosen rows of a cache in FP8 (DeepSeek-V3.2's sparse attention), and to those of a second cache.

    A sink is a further score without a value: it takes its share of the softmax, ``o ← o · exp(lse) / (exp(lse) +
    exp(sink))``, and leaves lse as it is.

    Args:
        q_BSHX: Queries, X = 576 or 512 as the cache's layout says.
        cache_NPZ: Bytes in a layout of `latent_layout`. What no choice names may hold anything.
        rows_BSK: int32 page · P + place of each choice; negative or beyond the cache: no choice.
        scale: Factor on the scores; X**-0.5 by default.
        v_dim: V, at most 512.
        sink_H: float32; ±∞ are allowed.
        lengths_B: int32 in [0, K]: only the first so many choices of each query of a request count.
        extra_cache_NPZ: Second cache in the same layout, with pages of its own size.
        extra_rows_BSK: Choices from it; their number may differ.
        extra_lengths_B: As `lengths_B`, for these.
        splits: How the work is shared out on a GPU, from `plan_splits` for `sparse_lengths`; made here otherwise.

    Returns:
        o_BSHV in q's dtype, lse_BHS in float32 (float64 for float64). Latents are dequantised in float32 and rounded
        to q's dtype, which for bfloat16 is exact.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together; a gradient would be lost.
    """
    op = "paged_sparse_mla_decode"
    B, S, H, X = _checked_queries(op, q_BSHX)
    layout = _checked_scope(op, "", cache_NPZ, rows_BSK, lengths_B, (B, S))
    if layout.width != X or not 0 < v_dim <= MOST_VALUES:
        raise ValueError(
            f"{op}: {layout.name} hold {layout.width} dimensions, of which 1 to {MOST_VALUES} are the value; got q "
            f"{list(q_BSHX.shape)} and v_dim {v_dim}"
        )
    if (extra_cache_NPZ is None) != (extra_rows_BSK is None) or (
        extra_rows_BSK is None and extra_lengths_B is not None
    ):
        raise ValueError(f"{op}: extra_cache and extra_rows come together, extra_lengths only with them")
    if extra_cache_NPZ is not None and extra_rows_BSK is not None:
        extra = _checked_scope(op, "extra_", extra_cache_NPZ, extra_rows_BSK, extra_lengths_B, (B, S))
        if extra != layout:
            raise ValueError(f"{op}: both caches must have one layout, got {layout.name} and {extra.name}")
    if sink_H is not None and (sink_H.shape != (H,) or sink_H.dtype != torch.float32):
        raise ValueError(f"{op}: sink must be float32 [H] = [{H}], got {sink_H.dtype} {list(sink_H.shape)}")
    same_device(
        op, q=q_BSHX, cache=cache_NPZ, rows=rows_BSK, sink=sink_H, lengths=lengths_B, extra_cache=extra_cache_NPZ,
        extra_rows=extra_rows_BSK, extra_lengths=extra_lengths_B,
    )  # fmt: skip
    _checked_splits(op, splits, q_BSHX)
    scale = X**-0.5 if scale is None else scale
    scopes = [(cache_NPZ, rows_BSK, lengths_B)]
    if extra_cache_NPZ is not None and extra_rows_BSK is not None:
        scopes.append((extra_cache_NPZ, extra_rows_BSK, extra_lengths_B))
    return implementation(op, q_BSHX)(q_BSHX, scopes, scale, v_dim, sink_H, splits)


def _checked_queries(op: str, q_BSHX: Tensor) -> tuple[int, int, int, int]:
    if q_BSHX.dim() != 4 or not q_BSHX.dtype.is_floating_point or not q_BSHX.shape[3]:
        raise ValueError(f"{op}: q must be floating point [B, S, H, X], got {q_BSHX.dtype} {list(q_BSHX.shape)}")
    if q_BSHX.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: there is no backward; detach q or decode under torch.no_grad()")
    B, S, H, X = q_BSHX.shape
    return B, S, H, X


def _checked_lengths(op: str, name: str, lengths_B: Tensor, B: int, most: int) -> None:
    if lengths_B.shape != (B,) or lengths_B.dtype != torch.int32:
        raise ValueError(f"{op}: {name} must be int32 [B] = [{B}], got {lengths_B.dtype} {list(lengths_B.shape)}")
    if B and looks_at_values(lengths_B):
        low, high = int(lengths_B.min()), int(lengths_B.max())
        if low < 0 or high > most:
            raise ValueError(f"{op}: {name} must be in [0, {most}], got {low} to {high}")


def _checked_splits(op: str, splits: Splits | None, q_BSHX: Tensor) -> None:
    """Kernels take a request's number from the table: one of another batch would lead them out of their tensors."""
    if splits is None:
        return
    table, ends, B = splits.table_R3, splits.ends_B, q_BSHX.shape[0]
    fits = table.dim() == 2 and table.shape[1] == 3 and ends.shape == (B + 1,)
    if not fits or any(x.dtype != torch.int32 or not x.is_contiguous() for x in (table, ends)):
        raise ValueError(
            f"{op}: splits must be from plan_splits for B = {B} requests, int32 [R, 3] and [{B + 1}] without gaps, got "
            f"{table.dtype} {list(table.shape)} and {ends.dtype} {list(ends.shape)}"
        )
    same_device(op, q=q_BSHX, splits=table, ends=ends)


def _checked_scope(
    op: str, prefix: str, cache_NPZ: Tensor, rows_BSK: Tensor, lengths_B: Tensor | None, queries: tuple[int, int]
) -> LatentLayout:
    layout = layout_of(cache_NPZ, f"{op}: {prefix}cache")
    if rows_BSK.dim() != 3 or rows_BSK.shape[:2] != queries or rows_BSK.dtype != torch.int32:
        raise ValueError(
            f"{op}: {prefix}rows must be int32 [B, S, K] with B, S = {list(queries)}, got {rows_BSK.dtype} "
            f"{list(rows_BSK.shape)}"
        )
    if lengths_B is not None:
        _checked_lengths(op, f"{prefix}lengths", lengths_B, queries[0], rows_BSK.shape[2])
    return layout
