"""Kernel of causal attention: one block of queries of one head, online softmax over the keys it may see.

Scores are kept in units of log2 e, since the hardware has only exp2. A head dimension is cut into the largest power of
two that fits and the rest (192 = 128 + 64), so that few of the numbers multiplied are padding. Strides are in elements;
the last dimension of q, k and v is contiguous. Sequence b, head h, J query heads per key head, S positions.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(base, rows, stride, end, FIRST: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Numbers FIRST … FIRST + TILE of `rows`; 0 past row `end` and past WIDTH."""
    column = FIRST + tl.arange(0, TILE)
    inside = (rows < end)[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + rows[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def visible(query, key, ids_ptr, selected_ptr, S, b, DOCUMENTS: tl.constexpr, SELECTED: tl.constexpr):
    """Whether a query may see a key, for positions that broadcast: [queries, 1] and [1, keys], or turned.

    ids: [B, S]; selected: [B, S, S] bytes.
    """
    seen = (key <= query) & (query < S)
    if DOCUMENTS:
        of_query = tl.load(ids_ptr + b * S + query, mask=query < S, other=0)
        seen = seen & (of_query == tl.load(ids_ptr + b * S + key, mask=key < S, other=0))
    if SELECTED:
        seen = seen & (tl.load(selected_ptr + (b * S + query) * S + key, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _over_keys(
    acc, largest, total, q_head, q_tail, query, first, last,
    k_base, v_base, k_s, v_s, ids_ptr, selected_ptr, b, S, scale_log2,
    Q: tl.constexpr, V: tl.constexpr, Q_HEAD: tl.constexpr, Q_TAIL: tl.constexpr, V_TILE: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    for start in range(first, last, KEYS):
        key = start + tl.arange(0, KEYS)
        x = tl.dot(q_head, load_tile(k_base, key, k_s, S, 0, Q, Q_HEAD).T, input_precision="ieee")
        if Q_TAIL > 0:
            x = tl.dot(q_tail, load_tile(k_base, key, k_s, S, Q_HEAD, Q, Q_TAIL).T, x, input_precision="ieee")
        x = x * scale_log2
        if MASKED:
            seen = visible(query[:, None], key[None, :], ids_ptr, selected_ptr, S, b, DOCUMENTS, SELECTED)
            x = tl.where(seen, x, float("-inf"))
        larger = tl.maximum(largest, tl.max(x, 1))
        # A row that has seen nothing yet stands at −inf, from which nothing may be subtracted.
        at = tl.where(larger == float("-inf"), 0.0, larger) if MASKED else larger
        p = tl.exp2(x - at[:, None])
        shrink = tl.exp2(largest - at)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(v_base, key, v_s, S, 0, V, V_TILE)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = larger
    return acc, largest, total


@triton.jit
def attend_forward(
    q_ptr, k_ptr, v_ptr, ids_ptr, first_ptr, selected_ptr, out_ptr, lse_ptr,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, S, H, J, scale_log2,
    Q: tl.constexpr, V: tl.constexpr, Q_HEAD: tl.constexpr, Q_TAIL: tl.constexpr, V_TILE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """out [B, S, H, V]; lse [B, H, S] = log2 Σ 2^x, +inf where nothing is seen.

    first [B, S] int32: the first position of each position's document. Grid: B · H · blocks of queries.
    """
    blocks = tl.cdiv(S, QUERIES)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest rows start first
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    h = tl.program_id(0) // blocks % H
    start = block * QUERIES
    query = start + tl.arange(0, QUERIES)
    q_base = q_ptr + b * q_b + h.to(tl.int64) * q_h
    k_base = k_ptr + b * k_b + (h // J).to(tl.int64) * k_h
    v_base = v_ptr + b * v_b + (h // J).to(tl.int64) * v_h
    q_head = load_tile(q_base, query, q_s, S, 0, Q, Q_HEAD)
    q_tail = q_head
    if Q_TAIL > 0:
        q_tail = load_tile(q_base, query, q_s, S, Q_HEAD, Q, Q_TAIL)
    acc = tl.zeros([QUERIES, V_TILE], tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    diagonal = start // KEYS * KEYS
    if DOCUMENTS:
        diagonal = tl.min(tl.load(first_ptr + b * S + query, mask=query < S, other=S)) // KEYS * KEYS
    elif SELECTED:
        diagonal = 0
    else:
        acc, largest, total = _over_keys(
            acc, largest, total, q_head, q_tail, query, 0, diagonal,
            k_base, v_base, k_s, v_s, ids_ptr, selected_ptr, b, S, scale_log2,
            Q, V, Q_HEAD, Q_TAIL, V_TILE, KEYS, False, False, False,
        )  # fmt: skip
    acc, largest, total = _over_keys(
        acc, largest, total, q_head, q_tail, query, diagonal, tl.minimum(start + QUERIES, S),
        k_base, v_base, k_s, v_s, ids_ptr, selected_ptr, b, S, scale_log2,
        Q, V, Q_HEAD, Q_TAIL, V_TILE, KEYS, True, DOCUMENTS, SELECTED,
    )  # fmt: skip
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    tl.store(lse_ptr + (b * H + h) * S + query, tl.where(some, largest + tl.log2(total), float("inf")), query < S)
    column = tl.arange(0, V_TILE)
    at = ((b * S + query) * H + h)[:, None] * V + column[None, :]
    inside = (query < S)[:, None] & (column < V)[None, :]
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), inside)
