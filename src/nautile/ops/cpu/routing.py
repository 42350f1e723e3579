"""Expert selection without sorting all experts: ``topk`` over keys that no two experts share."""

import torch
from torch import Tensor

from nautile.ops.reference import routing as reference

LOW = 0xFFFFFFFF


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Keys are made of the bits of a float32."""
    if device.type != "cpu":
        return f"tensors are on {device.type}"
    return None if dtype == torch.float32 else f"{dtype} is not float32"


def topk_gate(scores_TE: Tensor, k: int, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """See `nautile.ops.topk_gate`."""
    if topk_group < n_group:
        group_TG = reference.group_scores(scores_TE, n_group, group_score)
        scores_TE = reference.keep_groups(scores_TE, best(group_TG, topk_group), n_group)
    return best(scores_TE, k)


def best(scores: Tensor, k: int) -> Tensor:
    """int64 [..., k]: places of the k largest of the last dimension, of equal ones the first.

    A key is a float's bits, ordered as the floats are, above its place, counted from the end.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0 makes one zero of both
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats grow with falling bits
    places = torch.arange(scores.shape[-1] - 1, -1, -1)
    keys = (ordered.long() << 32) | places
    return scores.shape[-1] - 1 - (keys.topk(k, dim=-1).values & LOW)
