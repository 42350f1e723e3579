"""The dense SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate x) · up x)."""

from torch import Tensor, nn

from nautile import ops


class SwiGLU(nn.Module):
    """Feed-forward of the dense layers and of the shared expert.

    Args:
        dim: Width D of input and output.
        hidden: Width F between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))
