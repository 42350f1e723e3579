"""Specification of `nautile.ops.linear` and `nautile.ops.gated_linear`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile.ops.reference.activation import swiglu


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def linear(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Torch's own."""
    return F.linear(x, weight_OD, bias_O)


def gated_linear(x: Tensor, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """Two products, then the activation."""
    return swiglu(F.linear(x, gate_FD), F.linear(x, up_FD))
