"""Random FP8 operands and tiles by name, for the tests of the Hopper products."""

import torch

from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.hopper.tiles import Share, Tile

NAN_BYTE = 0x7F


def operand(*shape: int, block: tuple[int, int] = (1, 128)) -> Fp8Tensor:
    """Fresh e4m3 numbers, and scales of either size."""
    r, c = block
    data = torch.randn(*shape).to(torch.float8_e4m3fn)
    return Fp8Tensor(data, torch.rand(*shape[:-2], -(-shape[-2] // r), -(-shape[-1] // c)) + 0.5, block)


def poison(x: Fp8Tensor, index: torch.Tensor | tuple[int, slice]) -> None:
    """NaN in numbers and scales of rows that no result may depend on."""
    x.data.view(torch.uint8)[index] = NAN_BYTE
    x.scale[index] = float("nan")


def tile(block_m: int, block_n: int, share: Share = Share.NONE, stages: int = 3) -> Tile:
    """A tile of one's own choice, with shared memory for any result."""
    slabs = max(block_m, 64)
    stage = (slabs + block_n) * 132 + 16
    return Tile(block_m, block_n, stages, share, stages * stage + slabs * block_n * 2)
