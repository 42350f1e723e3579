"""The dense SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate x) · up x)."""

from torch import Tensor, nn

from nautile import ops
from nautile.layers.linear import Linear


class SwiGLU(nn.Module):
    """Feed-forward of the dense layers and of the shared expert.

    Args:
        dim: Width D of input and output.
        hidden: Width F between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden, bias=False)
        self.up_proj = Linear(dim, hidden, bias=False)
        self.down_proj = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return self.down_proj(ops.gated_linear(x, self.gate_proj.weight, self.up_proj.weight))
