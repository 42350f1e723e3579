"""Specification of `nautile.ops.linear_cross_entropy`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile.ops.precision import accumulate_dtype, compute_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
    """Whole logits, then torch's cross-entropy; `chunk` changes nothing here."""
    dtype = compute_dtype(x_TD)
    logits_TV = F.linear(x_TD.to(dtype), weight_VD.to(dtype)).to(accumulate_dtype(x_TD))
    return F.cross_entropy(logits_TV, targets_T, ignore_index=-100, reduction="sum")
