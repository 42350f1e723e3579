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
    """Choices sorted by expert once, then each expert's SwiGLU on its rows, and the weighted results added back."""
    dtype = compute_dtype(x_TD)
    choice_X = experts_TK.flatten()
    order_X = choice_X.argsort(stable=True)
    token_X = order_X.div(experts_TK.shape[1], rounding_mode="floor")
    counts = torch.bincount(choice_X, minlength=gate_up_E2FD.shape[0]).tolist()  # all that waits for a device
    parts = []
    for e, rows_ND in enumerate(x_TD.to(dtype)[token_X].split(counts)):
        if len(rows_ND) or not len(x_TD):  # without any tokens all run, on none: weights have gradients, zeros
            gate, up = F.linear(rows_ND, gate_up_E2FD[e].to(dtype)).chunk(2, dim=-1)
            parts.append(F.linear(F.silu(gate) * up, down_EDF[e].to(dtype)))
    wide = accumulate_dtype(x_TD)
    out_XD = torch.cat(parts).to(wide) * weights_TK.flatten()[order_X, None].to(wide)
    y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
    return y_TD.index_add(0, token_X, out_XD).to(dtype)
