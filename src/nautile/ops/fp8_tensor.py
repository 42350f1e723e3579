"""FP8 numbers with a factor per block: what the quantisers give and the products take."""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 448.0
"""Largest finite float8_e4m3fn."""
Block = tuple[int, int]


@dataclass(frozen=True)
class Fp8Tensor:
    """``x ≈ float32(data) · scale``, each scale serving one block of rows and columns (DeepSeek-V3 §3.3.2).

    Blocks at the edges may be cut. (1, 128) is V3's tile of an activation, (128, 128) its block of a weight.
    """

    data: Tensor
    """float8_e4m3fn [..., R, C], any strides."""
    scale: Tensor
    """float32 [..., ⌈R / r⌉, ⌈C / c⌉], any strides."""
    block: Block
    """(r, c): rows and columns that share a scale."""

    def __post_init__(self) -> None:
        (r, c), shape = self.block, self.data.shape
        if self.data.dtype != torch.float8_e4m3fn or self.data.dim() < 2:
            raise ValueError(f"Fp8Tensor: data must be float8_e4m3fn [..., R, C], got {self.data.dtype} {list(shape)}")
        if r < 1 or c < 1:
            raise ValueError(f"Fp8Tensor: block must be two positive sizes, got {self.block}")
        want = [*shape[:-2], -(-shape[-2] // r), -(-shape[-1] // c)]
        if self.scale.dtype != torch.float32 or list(self.scale.shape) != want:
            raise ValueError(
                f"Fp8Tensor: scale must be float32 {want} for data {list(shape)} in blocks of {self.block}, "
                f"got {self.scale.dtype} {list(self.scale.shape)}"
            )
        if self.scale.device != self.data.device:
            raise ValueError(f"Fp8Tensor: data is on {self.data.device}, scale on {self.scale.device}")

    @property
    def shape(self) -> torch.Size:
        """Shape of the data."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        """Where both tensors are."""
        return self.data.device

    def t(self) -> "Fp8Tensor":
        """The transpose, as views."""
        return Fp8Tensor(self.data.transpose(-1, -2), self.scale.transpose(-1, -2), (self.block[1], self.block[0]))

    def __getitem__(self, index: int) -> "Fp8Tensor":
        """One of a stack."""
        return Fp8Tensor(self.data[index], self.scale[index], self.block)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers it stands for, [..., R, C], multiplied in float32 and rounded once to `dtype`."""
        (r, c), (R, C) = self.block, self.data.shape[-2:]
        scale = self.scale
        if c > 1:
            scale = scale.repeat_interleave(c, dim=-1)[..., :C]
        if r > 1:
            scale = scale.repeat_interleave(r, dim=-2)[..., :R, :]
        return (self.data.float() * scale).to(dtype)
