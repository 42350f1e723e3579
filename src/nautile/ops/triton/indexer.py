"""Index scores and their gradients as tiles of products, and a selection that counts bits instead of sorting.

Nothing of size S × J × T exists: the backward pass computes each tile of products again. Sums have a fixed order.

B sequences, S queries, T rows, J indexer heads, I dimensions, K chosen rows; X = queries of a tile times their heads.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.triton.index_tiles import load_keys, load_queries, load_weights, products, scoring, tile_for, weighted
from nautile.ops.triton.support import floats as why_not
from nautile.ops.triton.support import next_power_of_two

__all__ = ["index_scores", "score_gradients", "scores", "top_rows", "why_not"]

CHUNK = 1024
"""Rows that one program scores."""
ROWS_AT_ONCE = 4096
"""Scores of a query that one program of `top_rows` looks at together."""


def index_scores(q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor) -> Tensor:
    """See `nautile.ops.index_scores`."""
    return _IndexScores.apply(q_BSJI, k_BTI, weights_BSJ)


class _IndexScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor) -> Tensor:
        ctx.save_for_backward(q_BSJI, k_BTI, weights_BSJ)
        return scores(q_BSJI, k_BTI, weights_BSJ)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BST: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BSJI, k_BTI, weights_BSJ = ctx.saved_tensors
        grads = score_gradients(q_BSJI, k_BTI, weights_BSJ, grad_BST)
        return grads[0].to(q_BSJI.dtype), grads[1].to(k_BTI.dtype), grads[2].to(weights_BSJ.dtype)


def scores(q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor) -> Tensor:
    """float32 [B, S, T]: the forward pass alone."""
    (B, S, J, width), T = q_BSJI.shape, k_BTI.shape[1]
    out_BST = torch.empty(B, S, T, dtype=torch.float32, device=q_BSJI.device)
    if out_BST.numel() == 0:
        return out_BST
    q, k, weights = _operands(q_BSJI, k_BTI, weights_BSJ)
    tile, launch = scoring(J, width, q.element_size())
    index_scores_kernel[(triton.cdiv(S, tile.queries), triton.cdiv(T, CHUNK), B)](
        q, k, weights, out_BST, S, T, J, width, CHUNK,
        BLOCK_S=tile.queries, BLOCK_T=tile.keys, BLOCK_J=tile.heads, BLOCK_I=tile.width, **launch,
    )  # fmt: skip
    return out_BST


def score_gradients(
    q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor, grad_BST: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 gradients of q, k and weights for that of the scores."""
    (B, S, J, width), T = q_BSJI.shape, k_BTI.shape[1]
    q, k, weights = _operands(q_BSJI, k_BTI, weights_BSJ)
    grad = grad_BST.float().contiguous()
    grad_q, grad_k, grad_weights = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (q, k, weights))
    if grad.numel() == 0:
        return grad_q, grad_k, grad_weights
    wide = q.dtype.itemsize > 2
    # A program that also sums dq keeps 64 heads beside it, or runs out of registers; float32 rows take twice the room.
    launch = {"num_warps": 8 if wide else 4, "num_stages": 2}
    tile = tile_for(J, width, columns=64, keys=32 if wide else 64)
    query_gradients_kernel[(triton.cdiv(S, tile.queries), B)](
        q, k, weights, grad, grad_q, grad_weights, S, T, J, width,
        BLOCK_S=tile.queries, BLOCK_T=tile.keys, BLOCK_J=tile.heads, BLOCK_I=tile.width, **launch,
    )  # fmt: skip
    tile = tile_for(J, width, columns=64 if wide else 128, keys=32 if wide else 64)
    key_gradients_kernel[(triton.cdiv(T, tile.keys), B)](
        q, k, weights, grad, grad_k, S, T, J, width,
        BLOCK_S=tile.queries, BLOCK_T=tile.keys, BLOCK_J=tile.heads, BLOCK_I=tile.width, num_warps=8, num_stages=2,
    )  # fmt: skip
    return grad_q, grad_k, grad_weights


def _operands(q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous, queries and keys in one dtype, weights in float32."""
    dtype = torch.promote_types(q_BSJI.dtype, k_BTI.dtype)
    return q_BSJI.to(dtype).contiguous(), k_BTI.to(dtype).contiguous(), weights_BSJ.float().contiguous()


@triton.jit
def index_scores_kernel(
    q, k, weights, out, S, T, J, I, chunk,  # noqa: E741
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Program (a, c, b): queries from a · BLOCK_S on, rows from c · chunk on, of sequence b."""
    s, b = tl.program_id(0) * BLOCK_S, tl.program_id(2).to(tl.int64)
    row_S = s + tl.arange(0, BLOCK_S)
    q_XI = load_queries(q + b * S * J * I, s, S, J, I, BLOCK_S, BLOCK_J, BLOCK_I)
    w_X = load_weights(weights + b * S * J, s, S, J, BLOCK_S, BLOCK_J)
    begin = tl.program_id(1) * chunk
    stop = tl.minimum(begin + chunk, T)
    for t in range(begin, stop, BLOCK_T):
        row_T = t + tl.arange(0, BLOCK_T)
        k_TI = load_keys(k + b * T * I, t, stop, I, BLOCK_T, BLOCK_I)
        scores_TS = weighted(k_TI, q_XI, w_X, BLOCK_T, BLOCK_S, BLOCK_J)
        there_TS = (row_S < S)[None, :] & (row_T < stop)[:, None]
        tl.store(out + (b * S + row_S)[None, :] * T + row_T[:, None], scores_TS, mask=there_TS)


@triton.jit
def flow_tile(
    grad, k_TI, q_XI, w_X, s, t, S, T,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """With a tile dI of the scores' gradient: relu(q·k) · dI, and dI · w where q·k > 0, both [BLOCK_T, X]."""
    row_S, row_T = s + tl.arange(0, BLOCK_S), t + tl.arange(0, BLOCK_T)
    there_TS = (row_S < S)[None, :] & (row_T < T)[:, None]
    grad_TS = tl.load(grad + row_S.to(tl.int64)[None, :] * T + row_T[:, None], mask=there_TS, other=0.0)
    grad_TSJ = tl.broadcast_to(grad_TS[:, :, None], (BLOCK_T, BLOCK_S, BLOCK_J))
    grad_TX = tl.reshape(grad_TSJ, (BLOCK_T, BLOCK_S * BLOCK_J))
    dots_TX = products(k_TI, q_XI)
    return dots_TX * grad_TX, tl.where(dots_TX > 0.0, grad_TX * w_X[None, :], 0.0)


@triton.jit
def query_gradients_kernel(
    q, k, weights, grad, grad_q, grad_weights, S, T, J, I,  # noqa: E741
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Program (a, b): dq and dw of queries from a · BLOCK_S on; it walks along all rows."""
    s, b = tl.program_id(0) * BLOCK_S, tl.program_id(1).to(tl.int64)
    q_XI = load_queries(q + b * S * J * I, s, S, J, I, BLOCK_S, BLOCK_J, BLOCK_I)
    w_X = load_weights(weights + b * S * J, s, S, J, BLOCK_S, BLOCK_J)
    dq_XI = tl.zeros((BLOCK_S * BLOCK_J, BLOCK_I), tl.float32)
    dw_X = tl.zeros((BLOCK_S * BLOCK_J,), tl.float32)
    for t in range(0, T, BLOCK_T):
        k_TI = load_keys(k + b * T * I, t, T, I, BLOCK_T, BLOCK_I)
        share_TX, flow_TX = flow_tile(grad + b * S * T, k_TI, q_XI, w_X, s, t, S, T, BLOCK_S, BLOCK_T, BLOCK_J)
        dw_X += tl.sum(share_TX, axis=0)
        dq_XI = tl.dot(tl.trans(flow_TX.to(k_TI.dtype)), k_TI, dq_XI, input_precision="ieee")
    x, i = tl.arange(0, BLOCK_S * BLOCK_J), tl.arange(0, BLOCK_I)
    row_X, head_X = s + x // BLOCK_J, x % BLOCK_J
    there_X = (row_X < S) & (head_X < J)
    place_X = (b * S + row_X) * J + head_X
    tl.store(grad_weights + place_X, dw_X, mask=there_X)
    tl.store(grad_q + place_X[:, None] * I + i[None, :], dq_XI, mask=there_X[:, None] & (i < I)[None, :])


@triton.jit
def key_gradients_kernel(
    q, k, weights, grad, grad_k, S, T, J, I,  # noqa: E741
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Program (a, b): dk of rows from a · BLOCK_T on; it walks along all queries."""
    t, b = tl.program_id(0) * BLOCK_T, tl.program_id(1).to(tl.int64)
    k_TI = load_keys(k + b * T * I, t, T, I, BLOCK_T, BLOCK_I)
    dk_TI = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
    for s in range(0, S, BLOCK_S):
        q_XI = load_queries(q + b * S * J * I, s, S, J, I, BLOCK_S, BLOCK_J, BLOCK_I)
        w_X = load_weights(weights + b * S * J, s, S, J, BLOCK_S, BLOCK_J)
        _, flow_TX = flow_tile(grad + b * S * T, k_TI, q_XI, w_X, s, t, S, T, BLOCK_S, BLOCK_T, BLOCK_J)
        dk_TI = tl.dot(flow_TX.to(q_XI.dtype), q_XI, dk_TI, input_precision="ieee")
    row_T, i = t + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_I)
    there_TI = (row_T < T)[:, None] & (i < I)[None, :]
    tl.store(grad_k + (b * T + row_T)[:, None] * I + i[None, :], dk_TI, mask=there_TI)


def top_rows(scores_BST: Tensor, seen_BST: Tensor, k: int) -> Tensor:
    """See `nautile.ops.top_rows`. Rows come out in ascending order.

    A radix selection: four passes over a query's scores, each fixing eight bits of the k-th best one, then one that
    writes down what is better, and of what equals it the first rows.
    """
    B, S, T = scores_BST.shape
    K = min(k, T)
    rows_BSK = torch.full((B, S, K), -1, dtype=torch.int64, device=scores_BST.device)
    if rows_BSK.numel() == 0:
        return rows_BSK
    seen_BST = seen_BST.expand(B, S, T).view(torch.uint8)
    block = min(ROWS_AT_ONCE, next_power_of_two(T))
    top_rows_kernel[(S, B)](
        scores_BST, seen_BST, rows_BSK, S, T, K, *scores_BST.stride(), *seen_BST.stride(),
        BLOCK=block, num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return rows_BSK


@triton.jit
def ranks(scores, seen, t, T, step_scores, step_seen, BLOCK: tl.constexpr):
    """uint32 [BLOCK] in the order of the scores, greater than 0 for those that may be chosen and 0 for others."""
    row = t + tl.arange(0, BLOCK)
    there = row < T
    x = tl.load(scores + row.to(tl.int64) * step_scores, mask=there, other=float("-inf")).to(tl.float32)
    may = there & (tl.load(seen + row.to(tl.int64) * step_seen, mask=there, other=0) != 0)
    x = tl.where(x == 0.0, 0.0, x)  # −0 equals 0
    bits = x.to(tl.uint32, bitcast=True)
    # Positive numbers in order above the negative ones, whose order is turned round; a NaN stands above all.
    rank = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    rank = tl.where(x != x, 0xFFFFFFFF, rank)
    return tl.where(may & (x != float("-inf")), rank, 0)


@triton.jit
def top_rows_kernel(
    scores, seen, rows, S, T, K,
    scores_b, scores_s, scores_t, seen_b, seen_s, seen_t,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (s, b): the selection of one query."""
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    scores += b * scores_b + s * scores_s
    seen += b * seen_b + s * seen_s
    rows += (b * S + s) * K
    digit = tl.arange(0, 256)
    prefix = tl.zeros((), tl.uint32)  # bits of the worst chosen rank that are known
    wanted = tl.zeros((), tl.int32) + K  # how many are still to be found among ranks of this prefix
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        count = tl.zeros((256,), tl.int32)
        for t in range(0, T, BLOCK):
            rank = ranks(scores, seen, t, T, scores_t, seen_t, BLOCK)
            # Two shifts: one by 32 is undefined.
            same = (rank >> shift >> 8) == prefix
            count += tl.histogram(((rank >> shift) & 255).to(tl.int32), 256, mask=same & (rank != 0))
        from_here = tl.sum(count) - tl.cumsum(count) + count  # ranks of this digit or a greater one
        wanted = tl.minimum(wanted, tl.sum(count))
        best = tl.max(tl.where(from_here >= wanted, digit, 0))
        wanted -= tl.sum(tl.where(digit > best, count, 0))
        prefix = (prefix << 8) | best.to(tl.uint32)
    chosen = tl.zeros((), tl.int32)
    ties = tl.zeros((), tl.int32)
    for t in range(0, T, BLOCK):
        rank = ranks(scores, seen, t, T, scores_t, seen_t, BLOCK)
        equal = ((rank == prefix) & (rank != 0)).to(tl.int32)
        take = (rank > prefix) | ((equal != 0) & (ties + tl.cumsum(equal) <= wanted))
        place = chosen + tl.cumsum(take.to(tl.int32)) - 1
        tl.store(rows + place, (t + tl.arange(0, BLOCK)).to(tl.int64), mask=take)
        chosen += tl.sum(take.to(tl.int32))
        ties += tl.sum(equal)
