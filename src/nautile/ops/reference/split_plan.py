"""Specification of `nautile.ops.plan_splits`."""

import torch
from torch import Tensor

from nautile.ops.split_kv import Splits, list_splits


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Python runs everywhere; on a GPU it waits for the lengths."""
    return None


def plan_splits(lengths_B: Tensor, parts: int, block: int, overhead: int) -> Splits:
    """The list, on the host."""
    splits, ends = list_splits(lengths_B.tolist(), parts, block, overhead)
    unused = [(-1, 0, 0)] * (len(lengths_B) + parts - len(splits))
    table_R3 = torch.tensor([*splits, *unused], dtype=torch.int32, device=lengths_B.device)
    return Splits(table_R3, torch.tensor(ends, dtype=torch.int32, device=lengths_B.device))
