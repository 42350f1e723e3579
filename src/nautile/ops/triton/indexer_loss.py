"""The indexer's loss over blocks of queries: the main attention's probabilities, summed over heads, in Triton.

Two sweeps over a block's scores: the first gives every head its log-sum-exp, the second adds the heads up, so that no
head's probabilities are ever written down.

S queries of a block, T positions up to its end, H heads, Q dimensions of one, in two parts that are powers of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nautile.ops.blocked_kl import Parts, blocked_kl
from nautile.ops.triton.indexer import score_gradients, scores
from nautile.ops.triton.support import floats as why_not
from nautile.ops.triton.support import next_power_of_two

__all__ = ["indexer_kl", "parts", "why_not"]

PAIRS = 1 << 22
"""Pairs of a query and a position in one block: 16 MiB of each of its matrices, and few pairs above the diagonal."""

SHARED_BYTES = 227 << 10
"""Shared memory of one block of threads on a Hopper."""


def indexer_kl(
    index_q_BSJI: Tensor,
    index_k_BSI: Tensor,
    weights_BSJ: Tensor,
    q_BSHQ: Tensor,
    k_BSHQ: Tensor,
    scale: float,
    selected_BSS: Tensor | None,
    document_ids_BS: Tensor | None,
) -> Tensor:
    """See `nautile.ops.indexer_kl`."""
    inputs = (index_q_BSJI, index_k_BSI, weights_BSJ, q_BSHQ, k_BSHQ, scale, selected_BSS, document_ids_BS)
    return blocked_kl(*inputs, parts())


def parts() -> Parts:
    """What this backend brings to the blocks."""
    return Parts(attention_target, scores, score_gradients, PAIRS)


def attention_target(q_SHQ: Tensor, k_THQ: Tensor, scale: float, hidden_ST: Tensor) -> Tensor:
    """float32 [S, T]: head-mean probabilities, 0 where hidden. float64 is lowered to float32."""
    (S, H, width), T = q_SHQ.shape, k_THQ.shape[0]
    if q_SHQ.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        q_SHQ = q_SHQ.float()
    k_THQ = k_THQ.to(q_SHQ.dtype)
    q_SHQ, k_THQ = (x if x.stride(2) == 1 else x.contiguous() for x in (q_SHQ, k_THQ))
    hidden = hidden_ST.contiguous().view(torch.uint8)
    lse_SH = torch.empty(S, H, dtype=torch.float32, device=q_SHQ.device)
    p_ST = torch.empty(S, T, dtype=torch.float32, device=q_SHQ.device)
    if p_ST.numel() == 0 or H == 0:
        return p_ST.zero_()
    first, rest = head_parts(width)
    block = block_for(first + rest, q_SHQ.element_size())
    sizes = {"BLOCK_S": block, "BLOCK_T": block, "FIRST": first, "REST": rest, "num_stages": 2}
    sizes["num_warps"] = 8 if block == 128 else 4
    strides = (*q_SHQ.stride()[:2], *k_THQ.stride()[:2])
    lse_kernel[(triton.cdiv(S, block), H)](q_SHQ, k_THQ, hidden, lse_SH, scale, S, T, H, width, *strides, **sizes)
    target_kernel[(triton.cdiv(S, block), triton.cdiv(T, block))](
        q_SHQ, k_THQ, hidden, lse_SH, p_ST, scale, S, T, H, width, *strides, **sizes
    )
    return p_ST


def head_parts(width: int) -> tuple[int, int]:
    """The head's width as a tile of its largest power of two and one for the rest (0 for none): 192 = 128 + 64."""
    first = max(16, next_power_of_two(width + 1) // 2)
    return first, max(16, next_power_of_two(width - first)) if width > first else 0


def block_for(width: int, element_size: int) -> int:
    """Queries, and keys, of a block: two stages of both are in shared memory, of which there are 227 KiB.

    Tensor cores do not take float32 as it is: its products are made one by one from registers, which hold fewer.
    """
    row = width * element_size
    fitting = next(block for block in (128, 64, 32, 16) if 4 * block * row <= SHARED_BYTES or block == 16)
    return min(fitting, 128 if element_size == 2 else 32)


@triton.jit
def part(x, row, rows, stride, start, width, BLOCK: tl.constexpr):
    """[rows, BLOCK] of dimensions from `start` on; 0 where there is nothing."""
    q = start + tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (q < width)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * stride + q[None, :], mask=there, other=0.0)


@triton.jit
def masked_scores(q, k, hidden, scale, row_S, row_T, S, T, width, q_s, k_t, FIRST: tl.constexpr, REST: tl.constexpr):
    """float32 [S, T] of one head, −∞ where hidden and beyond the ends."""
    first_SQ, first_TQ = part(q, row_S, S, q_s, 0, width, FIRST), part(k, row_T, T, k_t, 0, width, FIRST)
    scores_ST = tl.dot(first_SQ, tl.trans(first_TQ), input_precision="ieee")
    if REST > 0:
        rest_SQ, rest_TQ = part(q, row_S, S, q_s, FIRST, width, REST), part(k, row_T, T, k_t, FIRST, width, REST)
        scores_ST = tl.dot(rest_SQ, tl.trans(rest_TQ), scores_ST, input_precision="ieee")
    there_ST = (row_S < S)[:, None] & (row_T < T)[None, :]
    hidden_ST = tl.load(hidden + row_S.to(tl.int64)[:, None] * T + row_T[None, :], mask=there_ST, other=1)
    return tl.where(hidden_ST != 0, float("-inf"), scores_ST * scale)


@triton.jit
def lse_kernel(
    q, k, hidden, lse, scale, S, T, H, width, q_s, q_h, k_t, k_h,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program (a, h): log Σ_t exp(score) of queries from a · BLOCK_S on, −∞ for one that sees nothing."""
    row_S = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    h = tl.program_id(1).to(tl.int64)
    most_S = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    sum_S = tl.zeros((BLOCK_S,), tl.float32)
    # The queries are the last S of the T positions: these see nothing from here on.
    end = tl.minimum(T, T - S + (tl.program_id(0) + 1) * BLOCK_S)
    for t in range(0, end, BLOCK_T):
        row_T = t + tl.arange(0, BLOCK_T)
        scores_ST = masked_scores(
            q + h * q_h, k + h * k_h, hidden, scale, row_S, row_T, S, T, width, q_s, k_t, FIRST, REST
        )
        more_S = tl.maximum(most_S, tl.max(scores_ST, axis=1))
        base_S = tl.where(more_S == float("-inf"), 0.0, more_S)  # −∞ − −∞ is NaN
        sum_S = sum_S * tl.exp(most_S - base_S) + tl.sum(tl.exp(scores_ST - base_S[:, None]), axis=1)
        most_S = more_S
    log_S = tl.log(tl.where(sum_S > 0.0, sum_S, 1.0))
    tl.store(lse + row_S.to(tl.int64) * H + h, most_S + log_S, mask=row_S < S)


@triton.jit
def target_kernel(
    q, k, hidden, lse, p, scale, S, T, H, width, q_s, q_h, k_t, k_h,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program (a, c): one tile of the mean over heads."""
    row_S = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    row_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    sum_ST = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
    last = T - S + (tl.program_id(0) + 1) * BLOCK_S - 1
    heads = tl.where(tl.program_id(1) * BLOCK_T <= last, H, 0)  # a tile above the diagonal is 0 without asking them
    for h in range(heads):
        scores_ST = masked_scores(q, k, hidden, scale, row_S, row_T, S, T, width, q_s, k_t, FIRST, REST)
        lse_S = tl.load(lse + row_S.to(tl.int64) * H + h, mask=row_S < S, other=0.0)
        lse_S = tl.where(lse_S == float("-inf"), 0.0, lse_S)
        sum_ST += tl.exp(scores_ST - lse_S[:, None])
        q += q_h
        k += k_h
    there_ST = (row_S < S)[:, None] & (row_T < T)[None, :]
    tl.store(p + row_S.to(tl.int64)[:, None] * T + row_T[None, :], sum_ST / H, mask=there_ST)
