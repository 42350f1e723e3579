"""Kernels of the backward of causal attention: probabilities again, then gradients of keys and of queries, each by
programs that own what they write, so that sums keep their order and nothing is added atomically.

Names and units as in `flash_forward`. ``ds = p ⊙ (do vᵀ − δ),  δ = Σ_v do o,  dq = scale · ds k,  dk = scale · dsᵀ q,
dv = pᵀ do`` (arXiv 2307.08691, algorithm 2).
"""

import triton
import triton.language as tl

from nautile.ops.triton.flash_forward import load_tile, visible


@triton.jit
def dot_of_rows(a_ptr, b_ptr, out_ptr, N, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """out_n = Σ a_n ⊙ b_n over rows of WIDTH contiguous numbers, in float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, TILE)
    inside = (row < N)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    a = tl.load(a_ptr + at, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(a * tl.load(b_ptr + at, inside, 0.0).to(tl.float32), 1), row < N)


@triton.jit
def _store_tile(base, tile, rows, stride, end, FIRST: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    column = FIRST + tl.arange(0, TILE)
    inside = (rows < end)[:, None] & (column < WIDTH)[None, :]
    at = rows[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(base + at, tile.to(base.dtype.element_ty), inside)


@triton.jit
def gradients_of_keys(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, ids_ptr, last_ptr, selected_ptr, dk_ptr, dv_ptr,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, S, H, J, scale, scale_log2,
    Q: tl.constexpr, V: tl.constexpr, Q_HEAD: tl.constexpr, Q_TAIL: tl.constexpr, V_TILE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """dk [B, S, G, Q] and dv [B, S, G, V] of a block of keys of one key head, over the J query heads that share it.

    do [B, S, H, V] contiguous, delta [B, S, H]; last [B, S] int32: the last position of each position's document.
    Grid: B · G · blocks of keys.
    """
    G = H // J
    blocks = tl.cdiv(S, KEYS)
    b = (tl.program_id(0) // blocks // G).to(tl.int64)
    g = tl.program_id(0) // blocks % G
    start = tl.program_id(0) % blocks * KEYS
    key = start + tl.arange(0, KEYS)
    k_base, v_base = k_ptr + b * k_b + g.to(tl.int64) * k_h, v_ptr + b * v_b + g.to(tl.int64) * v_h
    k_head = load_tile(k_base, key, k_s, S, 0, Q, Q_HEAD)
    k_tail = k_head
    dk_head = tl.zeros([KEYS, Q_HEAD], tl.float32)
    dk_tail = dk_head
    if Q_TAIL > 0:
        k_tail = load_tile(k_base, key, k_s, S, Q_HEAD, Q, Q_TAIL)
        dk_tail = tl.zeros([KEYS, Q_TAIL], tl.float32)
    v = load_tile(v_base, key, v_s, S, 0, V, V_TILE)
    dv = tl.zeros([KEYS, V_TILE], tl.float32)
    first = start // QUERIES * QUERIES
    end = S
    if DOCUMENTS:
        end = tl.max(tl.load(last_ptr + b * S + key, key < S, -1)) + 1
    for j in range(J):
        h = (g * J + j).to(tl.int64)
        q_base, do_base = q_ptr + b * q_b + h * q_h, do_ptr + (b * S * H + h) * V
        lse_base, delta_base = lse_ptr + (b * H + h) * S, delta_ptr + b * S * H + h
        # One loop, and scores turned to [keys, queries], whose sums over queries need no transpose: a second loop
        # without masks, or transposes, and the sums no longer fit into registers.
        for at in range(first, end, QUERIES):
            query = at + tl.arange(0, QUERIES)
            q_head = load_tile(q_base, query, q_s, S, 0, Q, Q_HEAD)
            q_tail = q_head
            x = tl.dot(k_head, q_head.T, input_precision="ieee")
            if Q_TAIL > 0:
                q_tail = load_tile(q_base, query, q_s, S, Q_HEAD, Q, Q_TAIL)
                x = tl.dot(k_tail, q_tail.T, x, input_precision="ieee")
            lse = tl.load(lse_base + query, query < S, float("inf"))
            seen = visible(query[None, :], key[:, None], ids_ptr, selected_ptr, S, b, DOCUMENTS, SELECTED)
            p = tl.exp2(tl.where(seen, x * scale_log2 - lse[None, :], float("-inf")))
            do = load_tile(do_base, query, H * V, S, 0, V, V_TILE)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            delta = tl.load(delta_base + query * H, query < S, 0.0)
            ds = p * (tl.dot(v, do.T, input_precision="ieee") - delta[None, :])
            ds = ds.to(q_head.dtype)
            dk_head = tl.dot(ds, q_head, dk_head, input_precision="ieee")
            if Q_TAIL > 0:
                dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision="ieee")
    dk_base, dv_base = dk_ptr + (b * S * G + g) * Q, dv_ptr + (b * S * G + g) * V
    _store_tile(dk_base, dk_head * scale, key, G * Q, S, 0, Q, Q_HEAD)
    if Q_TAIL > 0:
        _store_tile(dk_base, dk_tail * scale, key, G * Q, S, Q_HEAD, Q, Q_TAIL)
    _store_tile(dv_base, dv, key, G * V, S, 0, V, V_TILE)


@triton.jit
def _through_keys(
    dq_head, dq_tail, q_head, q_tail, do, lse, delta, query, first, last,
    k_base, v_base, k_s, v_s, ids_ptr, selected_ptr, b, S, scale_log2,
    Q: tl.constexpr, V: tl.constexpr, Q_HEAD: tl.constexpr, Q_TAIL: tl.constexpr, V_TILE: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    for start in range(first, last, KEYS):
        key = start + tl.arange(0, KEYS)
        k_head = load_tile(k_base, key, k_s, S, 0, Q, Q_HEAD)
        k_tail = k_head
        if Q_TAIL > 0:
            k_tail = load_tile(k_base, key, k_s, S, Q_HEAD, Q, Q_TAIL)
        x = tl.dot(q_head, k_head.T, input_precision="ieee")
        if Q_TAIL > 0:
            x = tl.dot(q_tail, k_tail.T, x, input_precision="ieee")
        x = x * scale_log2 - lse[:, None]
        if MASKED:
            seen = visible(query[:, None], key[None, :], ids_ptr, selected_ptr, S, b, DOCUMENTS, SELECTED)
            x = tl.where(seen, x, float("-inf"))
        p = tl.exp2(x)
        v = load_tile(v_base, key, v_s, S, 0, V, V_TILE)
        ds = p * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
        ds = ds.to(k_head.dtype)
        dq_head = tl.dot(ds, k_head, dq_head, input_precision="ieee")
        if Q_TAIL > 0:
            dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision="ieee")
    return dq_head, dq_tail


@triton.jit
def gradients_of_queries(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, ids_ptr, first_ptr, selected_ptr, dq_ptr,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, S, H, J, scale, scale_log2,
    Q: tl.constexpr, V: tl.constexpr, Q_HEAD: tl.constexpr, Q_TAIL: tl.constexpr, V_TILE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """dq [B, S, H, Q] of a block of queries of one head. Grid: B · H · blocks of queries."""
    blocks = tl.cdiv(S, QUERIES)
    block = blocks - 1 - tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    h = (tl.program_id(0) // blocks % H).to(tl.int64)
    start = block * QUERIES
    query = start + tl.arange(0, QUERIES)
    q_base = q_ptr + b * q_b + h * q_h
    k_base, v_base = k_ptr + b * k_b + h // J * k_h, v_ptr + b * v_b + h // J * v_h
    q_head = load_tile(q_base, query, q_s, S, 0, Q, Q_HEAD)
    q_tail = q_head
    dq_head = tl.zeros([QUERIES, Q_HEAD], tl.float32)
    dq_tail = dq_head
    if Q_TAIL > 0:
        q_tail = load_tile(q_base, query, q_s, S, Q_HEAD, Q, Q_TAIL)
        dq_tail = tl.zeros([QUERIES, Q_TAIL], tl.float32)
    do = load_tile(do_ptr + (b * S * H + h) * V, query, H * V, S, 0, V, V_TILE)
    lse = tl.load(lse_ptr + (b * H + h) * S + query, query < S, float("inf"))
    delta = tl.load(delta_ptr + (b * S + query) * H + h, query < S, 0.0)
    diagonal = start // KEYS * KEYS
    if DOCUMENTS:
        diagonal = tl.min(tl.load(first_ptr + b * S + query, query < S, S)) // KEYS * KEYS
    elif SELECTED:
        diagonal = 0
    else:
        dq_head, dq_tail = _through_keys(
            dq_head, dq_tail, q_head, q_tail, do, lse, delta, query, 0, diagonal,
            k_base, v_base, k_s, v_s, ids_ptr, selected_ptr, b, S, scale_log2,
            Q, V, Q_HEAD, Q_TAIL, V_TILE, KEYS, False, False, False,
        )  # fmt: skip
    dq_head, dq_tail = _through_keys(
        dq_head, dq_tail, q_head, q_tail, do, lse, delta, query, diagonal, tl.minimum(start + QUERIES, S),
        k_base, v_base, k_s, v_s, ids_ptr, selected_ptr, b, S, scale_log2,
        Q, V, Q_HEAD, Q_TAIL, V_TILE, KEYS, True, DOCUMENTS, SELECTED,
    )  # fmt: skip
    dq_base = dq_ptr + (b * S * H + h) * Q
    _store_tile(dq_base, dq_head * scale, query, H * Q, S, 0, Q, Q_HEAD)
    if Q_TAIL > 0:
        _store_tile(dq_base, dq_tail * scale, query, H * Q, S, Q_HEAD, Q, Q_TAIL)
