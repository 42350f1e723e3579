"""What decoding over latents shares: a step of the online softmax, where a split's result goes, and merging splits.

Scores are in units of log 2. Splits of a request with several leave a float32 output and a log-sum-exp; `merge` makes
the weighted mean of them.

M rows of a tile (query heads), T latents of it, V value dimensions, R splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nautile.ops.split_kv import Splits
from nautile.ops.triton.support import next_power_of_two

LN2 = tl.constexpr(0.6931471805599453)
MERGED_ROWS = 8


def processors(device: torch.device) -> int:
    """How many programs run side by side: streaming multiprocessors, or in the interpreter, a few to test with."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def partial_results(splits: Splits, S: int, H: int, V: int) -> tuple[Tensor, Tensor]:
    """Room for the results of splits: float32 [R, S, H, V] and [R, S, H]."""
    R, device = splits.table_R3.shape[0], splits.table_R3.device
    f32 = torch.float32
    return torch.empty(R, S, H, V, dtype=f32, device=device), torch.empty(R, S, H, dtype=f32, device=device)


def merge(
    part_RSHV: Tensor, part_RSH: Tensor, splits: Splits, o_BSHV: Tensor, lse_BHS: Tensor, sink_H: Tensor | None
) -> None:
    """Results of requests with several splits; those of others are there already."""
    B, S, H, V = o_BSHV.shape
    merge_kernel[(triton.cdiv(S * H, MERGED_ROWS), B)](
        part_RSHV, part_RSH, splits.ends_B, o_BSHV, lse_BHS, sink_H, S, H, V,
        HAS_SINK=sink_H is not None, BLOCK_M=MERGED_ROWS, BLOCK_V=next_power_of_two(V), num_warps=4,
    )  # fmt: skip


@triton.jit
def attend(acc_MV, m_M, l_M, q_MV, q_MX, c_TV, k_TX, seen_MT, scale, HAS_TAIL: tl.constexpr):
    """One tile of latents: ``s = scale · (q·c + q_tail·k_tail)`` where seen, then acc, its maximum and its sum.

    `c_TV` is key and value; `k_TX` are key dimensions that are no value.
    """
    s_MT = tl.dot(q_MV, tl.trans(c_TV))
    if HAS_TAIL:
        s_MT = tl.dot(q_MX, tl.trans(k_TX), s_MT)
    s_MT = tl.where(seen_MT, s_MT * scale, float("-inf"))
    top_M = tl.maximum(m_M, tl.max(s_MT, 1))
    base_M = tl.where(top_M == float("-inf"), 0.0, top_M)  # −∞ − −∞ is no number
    p_MT = tl.exp2(s_MT - base_M[:, None])
    decay_M = tl.exp2(m_M - base_M)
    l_M = l_M * decay_M + tl.sum(p_MT, 1)
    acc_MV = tl.dot(p_MT.to(c_TV.dtype), c_TV, acc_MV * decay_M[:, None])
    return acc_MV, top_M, l_M


@triton.jit
def write_split(
    acc_MV, m_M, l_M, b, split, s_M, h_M, row_M, v_V, sink,
    ends, out, lse, part, part_lse, S, H, V,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """To the output if the request has one split, else to the partial results. Rows that saw nothing are 0 and +∞."""
    there_MV = row_M[:, None] & (v_V < V)[None, :]
    empty_M = l_M == 0.0
    lse_M = tl.where(empty_M, float("-inf"), m_M + tl.log2(tl.where(empty_M, 1.0, l_M)))
    if tl.load(ends + b + 1) - tl.load(ends + b) == 1:
        total_M = l_M
        if HAS_SINK:
            base_M = tl.where(empty_M, 0.0, m_M)
            total_M += tl.exp2(tl.load(sink + h_M, mask=row_M, other=float("-inf")) / LN2 - base_M)
        o_MV = acc_MV / tl.where(empty_M, 1.0, total_M)[:, None]
        place_M = (b * S + s_M).to(tl.int64) * H + h_M
        tl.store(out + place_M[:, None] * V + v_V[None, :], o_MV.to(out.dtype.element_ty), mask=there_MV)
        natural_M = tl.where(empty_M, float("inf"), lse_M * LN2)
        tl.store(lse + (b.to(tl.int64) * H + h_M) * S + s_M, natural_M, mask=row_M)
    else:
        o_MV = acc_MV / tl.where(empty_M, 1.0, l_M)[:, None]
        place_M = (split * S + s_M).to(tl.int64) * H + h_M
        tl.store(part + place_M[:, None] * V + v_V[None, :], o_MV, mask=there_MV)
        tl.store(part_lse + place_M, lse_M, mask=row_M)


@triton.jit
def merge_kernel(
    part, part_lse, ends, out, lse, sink, S, H, V,
    HAS_SINK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Program (i, b): BLOCK_M rows (query, head) of request b."""
    b = tl.program_id(1)
    first, end = tl.load(ends + b), tl.load(ends + b + 1)
    if end - first == 1:
        return
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    v_V = tl.arange(0, BLOCK_V)
    there_M = row_M < S * H
    there_MV = there_M[:, None] & (v_V < V)[None, :]
    acc_MV = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    m_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_M = tl.zeros((BLOCK_M,), tl.float32)
    for split in range(first, end):
        place_M = (split * S * H + row_M).to(tl.int64)
        lse_M = tl.load(part_lse + place_M, mask=there_M, other=float("-inf"))
        o_MV = tl.load(part + place_M[:, None] * V + v_V[None, :], mask=there_MV, other=0.0)
        top_M = tl.maximum(m_M, lse_M)
        base_M = tl.where(top_M == float("-inf"), 0.0, top_M)
        weight_M, decay_M = tl.exp2(lse_M - base_M), tl.exp2(m_M - base_M)
        acc_MV = acc_MV * decay_M[:, None] + o_MV * weight_M[:, None]
        l_M = l_M * decay_M + weight_M
        m_M = top_M
    empty_M = l_M == 0.0
    natural_M = tl.where(empty_M, float("inf"), (m_M + tl.log2(tl.where(empty_M, 1.0, l_M))) * LN2)
    total_M = l_M
    if HAS_SINK:
        base_M = tl.where(empty_M, 0.0, m_M)
        total_M += tl.exp2(tl.load(sink + row_M % H, mask=there_M, other=float("-inf")) / LN2 - base_M)
    o_MV = acc_MV / tl.where(empty_M, 1.0, total_M)[:, None]
    place_M = b.to(tl.int64) * S * H + row_M
    tl.store(out + place_M[:, None] * V + v_V[None, :], o_MV.to(out.dtype.element_ty), mask=there_MV)
    tl.store(lse + (b.to(tl.int64) * H + row_M % H) * S + row_M // H, natural_M, mask=there_M)
