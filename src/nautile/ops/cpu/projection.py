"""Projections: oneDNN's kernels where no backward follows, torch's where one does."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile.ops.cpu import onednn
from nautile.ops.cpu.activation import swiglu
from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.cpu.support import needs_gradient

__all__ = ["gated_linear", "linear", "why_not"]


def linear(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """See `nautile.ops.linear`."""
    # In other dtypes than float32, torch's own choice is oneDNN already.
    if x.dtype == torch.float32 and _fast(x, weight_OD) and (bias_O is None or not needs_gradient(bias_O)):
        return onednn.product(x, weight_OD, bias_O)
    return F.linear(x, weight_OD, bias_O)


def gated_linear(x: Tensor, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """See `nautile.ops.gated_linear`."""
    if _fast(x, gate_FD, up_FD):
        return onednn.gated_product(x, gate_FD, up_FD)
    return swiglu(F.linear(x, gate_FD), F.linear(x, up_FD))


def _fast(x: Tensor, *weights: Tensor) -> bool:
    return not torch.is_autocast_enabled("cpu") and onednn.suits(x, *weights) and not needs_gradient(x, *weights)
