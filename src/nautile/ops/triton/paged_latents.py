"""Dense decoding over paged latents on a GPU: a program holds up to 64 query heads and walks along one split.

A tile of 64 latents is read once, for the scores of all these heads and as their values.

B requests, S queries, H heads, G latent heads, X dimensions of a latent, V of its value, P places of a page,
M rows (query, head) of one latent head, T latents of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nautile.ops.split_kv import BLOCK, TILE, Splits, dense_parts
from nautile.ops.split_plan import plan_splits
from nautile.ops.triton.latent_tiles import attend, merge, partial_results, processors, write_split
from nautile.ops.triton.support import next_power_of_two

LOG2_E = 1.4426950408889634


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Tensor cores multiply what the tiles hold: bfloat16 or float16."""
    return None if dtype in (torch.bfloat16, torch.float16) else f"{dtype} is neither bfloat16 nor float16"


def paged_mla_decode(
    q_BSHX: Tensor,
    cache_NPGX: Tensor,
    block_table_BW: Tensor,
    lengths_B: Tensor,
    v_dim: int,
    scale: float,
    causal: bool,
    splits: Splits | None,
) -> tuple[Tensor, Tensor]:
    """See `nautile.ops.paged_mla_decode`."""
    (B, S, H, X), (_, P, G, _), V = q_BSHX.shape, cache_NPGX.shape, v_dim
    o_BSHV = q_BSHX.new_empty(B, S, H, V)
    lse_BHS = q_BSHX.new_empty(B, H, S, dtype=torch.float32)
    if not o_BSHV.numel():
        return o_BSHV, lse_BHS
    lengths_B = lengths_B.contiguous()
    if splits is None:
        splits = plan_splits(lengths_B, dense_parts(processors(q_BSHX.device), S, H, G))
    part_RSHV, part_RSH = partial_results(splits, S, H, V)
    paged_mla_decode_kernel[(triton.cdiv(S * H // G, TILE) * G, splits.table_R3.shape[0])](
        q_BSHX.contiguous(), cache_NPGX, block_table_BW, lengths_B, splits.table_R3, splits.ends_B,
        o_BSHV, lse_BHS, part_RSHV, part_RSH, S, H, G, P, *cache_NPGX.stride()[:3], *block_table_BW.stride(),
        scale * LOG2_E, X, V, CAUSAL=causal, ONE_PAGE=P % BLOCK == 0, BLOCK_M=TILE, BLOCK_T=BLOCK,
        BLOCK_V=max(16, next_power_of_two(V)), BLOCK_X=max(16, next_power_of_two(X - V)),
        num_warps=8, num_stages=2,
    )  # fmt: skip
    merge(part_RSHV, part_RSH, splits, o_BSHV, lse_BHS, None)
    return o_BSHV, lse_BHS


@triton.jit
def paged_mla_decode_kernel(
    q, cache, table, lengths, splits, ends, out, lse, part, part_lse,
    S, H, G, P, stride_page, stride_place, stride_group, stride_table, step_table, scale,
    X: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, ONE_PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Program (i · G + g, r): the i-th BLOCK_M rows of latent head g, over split r."""
    split = tl.program_id(1)
    b = tl.load(splits + 3 * split)
    if b < 0:
        return
    length = tl.load(lengths + b)
    begin = tl.load(splits + 3 * split + 1) * BLOCK_T
    stop = tl.minimum(tl.load(splits + 3 * split + 2) * BLOCK_T, length)
    g, heads = tl.program_id(0) % G, H // G
    row_M = tl.program_id(0) // G * BLOCK_M + tl.arange(0, BLOCK_M)
    there_M = row_M < S * heads
    s_M, h_M = row_M // heads, g * heads + row_M % heads
    v_V, x_X, t_T = tl.arange(0, BLOCK_V), V + tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_T)
    q_M = q + ((b * S + s_M).to(tl.int64) * H + h_M) * X
    q_MV = tl.load(q_M[:, None] + v_V[None, :], mask=there_M[:, None] & (v_V < V)[None, :], other=0.0)
    q_MX = tl.load(q_M[:, None] + x_X[None, :], mask=there_M[:, None] & (x_X < X)[None, :], other=0.0)
    limit_M = length - S + 1 + s_M if CAUSAL else tl.full((BLOCK_M,), 0, tl.int32) + length
    acc_MV = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    m_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_M = tl.zeros((BLOCK_M,), tl.float32)
    pages = table + b.to(tl.int64) * stride_table
    rows = cache + g.to(tl.int64) * stride_group
    for t in range(begin, stop, BLOCK_T):
        there_T = t + t_T < stop
        if ONE_PAGE:  # one address for all, which is known early
            page = tl.load(pages + t // P * step_table).to(tl.int64)
            row_T = page * stride_page + (t % P + t_T) * stride_place
        else:
            page_T = tl.load(pages + (t + t_T) // P * step_table, mask=there_T, other=0).to(tl.int64)
            row_T = page_T * stride_page + (t + t_T) % P * stride_place
        c_TV = tl.load(rows + row_T[:, None] + v_V[None, :], mask=there_T[:, None] & (v_V < V)[None, :], other=0.0)
        k_TX = tl.load(rows + row_T[:, None] + x_X[None, :], mask=there_T[:, None] & (x_X < X)[None, :], other=0.0)
        seen_MT = (t + t_T)[None, :] < tl.minimum(limit_M, stop)[:, None]
        acc_MV, m_M, l_M = attend(acc_MV, m_M, l_M, q_MV, q_MX, c_TV, k_TX, seen_MT, scale, HAS_TAIL=X > V)
    write_split(
        acc_MV, m_M, l_M, b, split, s_M, h_M, there_M, v_V, None,
        ends, out, lse, part, part_lse, S, H, V, HAS_SINK=False,
    )  # fmt: skip
