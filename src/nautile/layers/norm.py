"""Root-mean-square normalisation (arXiv 1910.07467)."""

import torch
from torch import Tensor, nn

from nautile import ops


class RMSNorm(nn.Module):
    """y = x / √(mean(x²) + eps) · weight, over the last dimension. Statistics in float32.

    Args:
        dim: Size of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
