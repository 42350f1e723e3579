"""The routed experts of one MoE layer: E small SwiGLUs, stacked (DeepSeekMoE, arXiv 2401.06066 §3)."""

import torch
from torch import Tensor, nn

from nautile import ops


class Experts(nn.Module):
    """y_t = Σ_k w_tk · down_e(silu(gate_e x_t) · up_e x_t), with e = experts[t, k].

    `gate_up_proj` is [E, 2F, D], gate rows first; `down_proj` is [E, D, F]. Published files hold one tensor per
    expert and projection; `models/<family>/checkpoint.py` says how they map.
    """

    def __init__(self, n_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * hidden, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, hidden))

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D] → [T, D]."""
        return ops.grouped_swiglu(x_TD, self.gate_up_proj, self.down_proj, experts_TK, weights_TK)
