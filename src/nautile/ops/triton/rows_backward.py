"""Kernels of the backward of attention to chosen rows. Names as in `rows_forward`.

With p = exp(x − lse), lse now including the sink: ``ds = p ⊙ (do cᵀ − δ),  δ = Σ_c do o,  dq = scale · ds [c, k_rope],
d[c, k_rope] = scale · dsᵀ q + [pᵀ do, 0]``. A row is named by many queries, so its gradient is a sum over programs:
added atomically in float32, or written apart for each place and summed in a fixed order afterwards.
"""

import triton
import triton.language as tl

from nautile.ops.triton.rows_forward import LOG2_E, gather, load_heads, named, places_of


@triton.jit
def gradients_of_row_queries(
    q_ptr, q_rope_ptr, c_ptr, k_rope_ptr, rows_ptr, length_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dq_rope_ptr,
    q_b, q_s, q_h, r_b, r_s, r_h, c_b, c_t, k_b, k_t, dq_n, dq_h, dr_n, dr_h, S, H, T, K, scale,
    C: tl.constexpr, R: tl.constexpr, C_TILE: tl.constexpr, R_TILE: tl.constexpr,
    HEADS: tl.constexpr, PLACES: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """dq and dq_rope, strides dq_n, dr_n per query and dq_h, dr_h per head; do [B, S, H, C]. Grid as forward."""
    blocks = tl.cdiv(H, HEADS)
    query = (tl.program_id(0) // blocks).to(tl.int64)
    b, s = query // S, query % S
    head = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    q = load_heads(q_ptr + b * q_b + s * q_s, head, q_h, H, C, C_TILE)
    q_rope = q
    dq = tl.zeros([HEADS, C_TILE], tl.float32)
    dq_rope = dq
    if R > 0:
        q_rope = load_heads(q_rope_ptr + b * r_b + s * r_s, head, r_h, H, R, R_TILE)
        dq_rope = tl.zeros([HEADS, R_TILE], tl.float32)
    do = load_heads(do_ptr + query * H * C, head, C, H, C, C_TILE)
    lse = tl.load(lse_ptr + query * H + head, head < H, float("inf"))
    delta = tl.load(delta_ptr + query * H + head, head < H, 0.0)
    end = places_of(length_ptr, query, K, LENGTHS)
    for start in range(0, end, PLACES):
        row, valid = named(rows_ptr + query * K, start + tl.arange(0, PLACES), end, T)
        c = gather(c_ptr + b * c_b, row, valid, c_t, C, C_TILE)
        k_rope = c
        # The short product first: behind the long one float32 spills kilobytes of registers.
        x = tl.zeros([HEADS, PLACES], tl.float32)
        if R > 0:
            k_rope = gather(k_rope_ptr + b * k_b, row, valid, k_t, R, R_TILE)
            x = tl.dot(q_rope, k_rope.T, x, input_precision="ieee")
        x = tl.dot(q, c.T, x, input_precision="ieee")
        p = tl.where(valid[None, :], tl.exp2((x * scale - lse[:, None]) * LOG2_E), 0.0)
        ds = p * (tl.dot(do, c.T, input_precision="ieee") - delta[:, None])
        ds = ds.to(c.dtype)
        dq = tl.dot(ds, c, dq, input_precision="ieee")
        if R > 0:
            dq_rope = tl.dot(ds, k_rope, dq_rope, input_precision="ieee")
    column = tl.arange(0, C_TILE)
    inside = (head < H)[:, None] & (column < C)[None, :]
    at = query * dq_n + head[:, None] * dq_h + column[None, :]
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), inside)
    if R > 0:
        column = tl.arange(0, R_TILE)
        inside = (head < H)[:, None] & (column < R)[None, :]
        at = query * dr_n + head[:, None] * dr_h + column[None, :]
        tl.store(dq_rope_ptr + at, (dq_rope * scale).to(dq_rope_ptr.dtype.element_ty), inside)


@triton.jit
def _load_part(base, head, stride, first, H, WIDTH: tl.constexpr, TILE: tl.constexpr):
    column = first + tl.arange(0, TILE)
    inside = (head < H)[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + head[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _gather_part(base, row, valid, stride, first, WIDTH: tl.constexpr, TILE: tl.constexpr):
    column = first + tl.arange(0, TILE)
    inside = valid[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _add_part(
    part, base, row, row_stride, inside, first, again, WIDTH: tl.constexpr, TILE: tl.constexpr, ATOMIC: tl.constexpr
):  # fmt: skip
    column = first + tl.arange(0, TILE)
    inside = inside[:, None] & (column < WIDTH)[None, :]
    at = base + row[:, None] * row_stride + column[None, :]
    if ATOMIC:
        tl.atomic_add(at, part, inside, sem="relaxed")
    else:
        tl.store(at, part + tl.load(at, inside & again, 0.0), inside)


@triton.jit
def gradients_of_rows(
    q_ptr, q_rope_ptr, c_ptr, k_rope_ptr, rows_ptr, length_ptr, do_ptr, lse_ptr, delta_ptr, dc_ptr, dk_rope_ptr,
    q_b, q_s, q_h, r_b, r_s, r_h, c_b, c_t, k_b, k_t, dc_b, dc_t, dk_b, dk_t, S, H, T, K, first, scale,
    C: tl.constexpr, R: tl.constexpr, PART: tl.constexpr, R_TILE: tl.constexpr,
    HEADS: tl.constexpr, PLACES: tl.constexpr, LENGTHS: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """What one query gives to a block of the rows it names, summed over its heads, in float32.

    ATOMIC: added to dc, dk_rope, strides dc_b per sequence and dc_t per row. Otherwise written to place k of query
    n − first, strides dc_b and dc_t. Latents pass PART columns at a time: p and ds of a block of heads stay on the
    chip, sums as wide as a latent would not. Grid: queries from `first` on · blocks of places.
    """
    blocks = tl.cdiv(K, PLACES)
    query = (tl.program_id(0) // blocks).to(tl.int64) + first
    b, s = query // S, query % S
    end = places_of(length_ptr, query, K, LENGTHS)
    place = tl.program_id(0) % blocks * PLACES + tl.arange(0, PLACES)
    row, valid = named(rows_ptr + query * K, place, end, T)
    q_base, r_base, do_base = q_ptr + b * q_b + s * q_s, q_rope_ptr + b * r_b + s * r_s, do_ptr + query * H * C
    c_base, k_base = c_ptr + b * c_b, k_rope_ptr + b * k_b
    if ATOMIC:
        to, inside = row, valid
        dc_base, dk_base = dc_ptr + b * dc_b, dk_rope_ptr + b * dk_b
    else:
        to, inside = place.to(tl.int64), place < K
        dc_base, dk_base = dc_ptr + (query - first) * dc_b, dk_rope_ptr + (query - first) * dk_b
    for start in range(0, H, HEADS):
        head = start + tl.arange(0, HEADS)
        x = tl.zeros([HEADS, PLACES], tl.float32)
        dp = tl.zeros([HEADS, PLACES], tl.float32)
        for column in range(0, C, PART):
            c = _gather_part(c_base, row, valid, c_t, column, C, PART)
            q = _load_part(q_base, head, q_h, column, H, C, PART)
            do = _load_part(do_base, head, C, column, H, C, PART)
            x = tl.dot(q, c.T, x, input_precision="ieee")
            dp = tl.dot(do, c.T, dp, input_precision="ieee")
        if R > 0:
            k_rope = gather(k_base, row, valid, k_t, R, R_TILE)
            x = tl.dot(load_heads(r_base, head, r_h, H, R, R_TILE), k_rope.T, x, input_precision="ieee")
        # Past head H p = exp(0 − inf) = 0.
        lse = tl.load(lse_ptr + query * H + head, head < H, float("inf"))
        delta = tl.load(delta_ptr + query * H + head, head < H, 0.0)
        p = tl.where(valid[None, :], tl.exp2((x * scale - lse[:, None]) * LOG2_E), 0.0)
        ds = (p * (dp - delta[:, None]) * scale).to(q_ptr.dtype.element_ty).T
        p = p.to(q_ptr.dtype.element_ty).T
        for column in range(0, C, PART):
            dc = tl.dot(ds, _load_part(q_base, head, q_h, column, H, C, PART), input_precision="ieee")
            dc = tl.dot(p, _load_part(do_base, head, C, column, H, C, PART), dc, input_precision="ieee")
            _add_part(dc, dc_base, to, dc_t, inside, column, start > 0, C, PART, ATOMIC)
        if R > 0:
            dk_rope = tl.dot(ds, load_heads(r_base, head, r_h, H, R, R_TILE), input_precision="ieee")
            _add_part(dk_rope, dk_base, to, dk_t, inside, 0, start > 0, R, R_TILE, ATOMIC)
