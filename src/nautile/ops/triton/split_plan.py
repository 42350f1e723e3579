"""The schedule of splits made on the GPU, where the lengths are: one warp walks along the requests."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nautile.ops.split_kv import Splits


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Whole numbers: wherever Triton runs."""
    return None


def plan_splits(lengths_B: Tensor, parts: int, block: int, overhead: int) -> Splits:
    """See `nautile.ops.plan_splits`."""
    B, device = len(lengths_B), lengths_B.device
    table_R3 = torch.empty(B + parts, 3, dtype=torch.int32, device=device)
    ends_B = torch.empty(B + 1, dtype=torch.int32, device=device)
    plan_splits_kernel[(1,)](
        lengths_B.contiguous(), table_R3, ends_B, B, parts, block, overhead, BLOCK_B=128, num_warps=1
    )
    return Splits(table_R3, ends_B)


@triton.jit
def plan_splits_kernel(lengths, table, ends, B, parts, block, overhead, BLOCK_B: tl.constexpr):
    """`list_splits`, with a step of the loop per split instead of loops over workers and their requests."""
    i_B = tl.arange(0, BLOCK_B)
    sum_B = tl.zeros((BLOCK_B,), tl.int32)
    for i in range(0, B, BLOCK_B):
        length_B = tl.load(lengths + i + i_B, mask=i + i_B < B, other=0)
        cost_B = tl.maximum(tl.cdiv(length_B, block), 1) + overhead
        sum_B += tl.where(i + i_B < B, cost_B, 0)
    share = tl.cdiv(tl.sum(sum_B), parts) + overhead
    tl.store(ends, 0)
    request, at, left, made = 0, 0, share, 0
    while request < B:
        full = tl.cdiv(tl.load(lengths + request), block)
        rest = tl.maximum(full, 1) - at
        fits = left >= rest + overhead
        taken = tl.where(fits, rest, tl.maximum(left - overhead, 0))
        split = fits | (taken > 0)
        tl.store(table + 3 * made, request, mask=split)
        tl.store(table + 3 * made + 1, at, mask=split)
        tl.store(table + 3 * made + 2, tl.where(fits, full, at + taken), mask=split)
        made += split.to(tl.int32)
        tl.store(ends + request + 1, made, mask=fits)
        left = tl.where(fits, left - rest - overhead, share)
        at = tl.where(fits, 0, at + taken)
        request += fits.to(tl.int32)
    for i in range(made, B + parts, BLOCK_B):
        unused_B = i + i_B < B + parts
        tl.store(table + 3 * (i + i_B), -1, mask=unused_B)
        tl.store(table + 3 * (i + i_B) + 1, 0, mask=unused_B)
        tl.store(table + 3 * (i + i_B) + 2, 0, mask=unused_B)
