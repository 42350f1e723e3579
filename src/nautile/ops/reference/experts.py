"""Specification of `nautile.ops.grouped_swiglu`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile.ops.precision import accumulate_dtype, compute_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def grouped_swiglu(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Expert by expert: pick its tokens, run its SwiGLU, add the weighted result back."""
    dtype = compute_dtype(x_TD)
    y_TD = torch.zeros(x_TD.shape, dtype=accumulate_dtype(x_TD), device=x_TD.device)
    for expert, (gate_up_2FD, down_DF) in enumerate(zip(gate_up_E2FD.to(dtype), down_EDF.to(dtype), strict=True)):
        token, choice = (experts_TK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token].to(dtype), gate_up_2FD).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down_DF)
        y_TD = y_TD.index_add(0, token, out.to(y_TD.dtype) * weights_TK[token, choice, None].to(y_TD.dtype))
    return y_TD.to(dtype)
