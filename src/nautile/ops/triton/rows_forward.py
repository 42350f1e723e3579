"""Kernel of MLA's attention to chosen rows: one query, a block of its heads, online softmax over the rows it names.

A gathered latent is key and value of all heads, so a block of rows is read once per block of heads. Rows come as
numbers; any number that is no row marks an unused place. Strides are in elements; the last dimension of q, q_rope, c
and k_rope is contiguous. Scores are kept in units of log2 e.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_heads(base, head, stride, H, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """[heads, TILE] of one query; 0 past head H and past WIDTH."""
    column = tl.arange(0, TILE)
    inside = (head < H)[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + head[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def gather(base, row, valid, stride, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """[places, TILE] of the named rows; 0 where a place is not valid: what stands there may be NaN."""
    column = tl.arange(0, TILE)
    inside = valid[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def named(rows_ptr, place, end, T):
    """Row numbers as int64, 0 where there is none, and which places name one of T rows."""
    row = tl.load(rows_ptr + place, mask=place < end, other=-1).to(tl.int64)
    valid = (row >= 0) & (row < T)
    return tl.where(valid, row, 0), valid


@triton.jit
def places_of(length_ptr, query, K, LENGTHS: tl.constexpr):
    """How many of its K places a query uses, counted from the left."""
    end = K
    if LENGTHS:
        end = tl.minimum(tl.load(length_ptr + query), K).to(tl.int32)
    return end


@triton.jit
def attend_rows(
    q_ptr, q_rope_ptr, c_ptr, k_rope_ptr, rows_ptr, length_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr,
    q_b, q_s, q_h, r_b, r_s, r_h, c_b, c_t, k_b, k_t, S, H, T, K, scale,
    C: tl.constexpr, R: tl.constexpr, C_TILE: tl.constexpr, R_TILE: tl.constexpr,
    HEADS: tl.constexpr, PLACES: tl.constexpr, LENGTHS: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """out [B, S, H, C]; largest score and natural logarithm of the sum of exponentials [B, S, H], −inf and +inf
    without a row. rows [B, S, K]; length [B, S]; sink [H]. Grid: B · S · blocks of heads.
    """
    blocks = tl.cdiv(H, HEADS)
    query = (tl.program_id(0) // blocks).to(tl.int64)
    b, s = query // S, query % S
    head = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    q = load_heads(q_ptr + b * q_b + s * q_s, head, q_h, H, C, C_TILE)
    q_rope = q
    if R > 0:
        q_rope = load_heads(q_rope_ptr + b * r_b + s * r_s, head, r_h, H, R, R_TILE)
    acc = tl.zeros([HEADS, C_TILE], tl.float32)
    largest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    end = places_of(length_ptr, query, K, LENGTHS)
    for start in range(0, end, PLACES):
        row, valid = named(rows_ptr + query * K, start + tl.arange(0, PLACES), end, T)
        c = gather(c_ptr + b * c_b, row, valid, c_t, C, C_TILE)
        x = tl.dot(q, c.T, input_precision="ieee")
        if R > 0:
            k_rope = gather(k_rope_ptr + b * k_b, row, valid, k_t, R, R_TILE)
            x = tl.dot(q_rope, k_rope.T, x, input_precision="ieee")
        x = tl.where(valid[None, :], x * (scale * LOG2_E), float("-inf"))
        larger = tl.maximum(largest, tl.max(x, 1))
        at = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(x - at[:, None])
        shrink = tl.exp2(largest - at)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(c.dtype), c, acc * shrink[:, None], input_precision="ieee")
        largest = larger
    some = total > 0.0
    lse = tl.where(some, (largest + tl.log2(tl.where(some, total, 1.0))) * LN_2, float("inf"))
    at = tl.where(some, largest, 0.0)
    weight = total
    if SINK:
        sink = tl.load(sink_ptr + head, head < H, 0.0).to(tl.float32)
        weight += tl.exp2(sink * LOG2_E - at)
    acc = acc / tl.where(some, weight, 1.0)[:, None]
    tl.store(max_ptr + query * H + head, largest * LN_2, head < H)
    tl.store(lse_ptr + query * H + head, lse, head < H)
    column = tl.arange(0, C_TILE)
    inside = (head < H)[:, None] & (column < C)[None, :]
    tl.store(out_ptr + (query * H + head)[:, None] * C + column[None, :], acc.to(out_ptr.dtype.element_ty), inside)
