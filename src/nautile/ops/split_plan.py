"""The schedule of `split_kv` for lengths that are on a device."""

import torch
from torch import Tensor

from nautile.ops.dispatch import implementation
from nautile.ops.split_kv import BLOCK, OVERHEAD, Splits


def plan_splits(lengths_B: Tensor, parts: int, block: int = BLOCK, overhead: int = OVERHEAD) -> Splits:
    """`list_splits` of lengths that are on a device, made there without waiting for it.

    One plan serves all layers of a step: they have the same lengths.

    Args:
        lengths_B: int32, not negative.
        parts: Workers, from `dense_parts` or `sparse_parts`.
        block: Rows of a block.
        overhead: What beginning a request costs, in blocks.

    Raises:
        ValueError: Lengths are not int32 [B], or there is no request or no worker.
    """
    if lengths_B.dim() != 1 or lengths_B.dtype != torch.int32 or not lengths_B.numel() or parts < 1:
        raise ValueError(
            f"plan_splits: lengths must be int32 [B] with B and parts at least 1, got {lengths_B.dtype} "
            f"{list(lengths_B.shape)} and {parts} parts"
        )
    return implementation("plan_splits", lengths_B)(lengths_B, parts, block, overhead)
