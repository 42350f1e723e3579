"""Specification of `nautile.ops.swiglu`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile.ops.precision import accumulate_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) ⊙ up in float32 or better."""
    wide = accumulate_dtype(gate_TF)
    return (F.silu(gate_TF.to(wide)) * up_TF.to(wide)).to(gate_TF.dtype)
