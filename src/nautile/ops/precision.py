"""The dtype that an op computes in, with and without autocast."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of `x`, or the autocast dtype when autocast is on for its device. Double is never lowered."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Dtype for sums, norms and softmax over `x`: at least float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def no_autocast(x: Tensor) -> torch.autocast:
    """A context without autocast, for code that chooses its dtypes itself."""
    return torch.autocast(x.device.type, enabled=False)
