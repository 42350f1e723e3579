"""What DeepGEMM's own tests compare and count with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nautile.ops.numerics import calc_diff

__all__ = ["assert_bitwise_equal", "calc_diff", "count_bytes", "get_arch_major"]


def count_bytes(*tensors: "Tensor | Sequence | None") -> int:
    """Bytes of tensors, and of those in lists and tuples; None counts nothing."""
    total = 0
    for x in tensors:
        if isinstance(x, Tensor):
            total += x.numel() * x.element_size()
        elif x is not None:
            total += count_bytes(*x)
    return total


def assert_bitwise_equal(x: Tensor, y: Tensor, label: str = "") -> None:
    """Raise `AssertionError` unless both have the same bytes, shape and type."""
    what = f" ({label})" if label else ""
    assert x.shape == y.shape and x.dtype == y.dtype, (
        f"{x.dtype} {list(x.shape)} against {y.dtype} {list(y.shape)}{what}"
    )
    first, second = (z.contiguous().flatten().view(torch.uint8).view(z.numel(), -1) for z in (x, y))
    differ = (first != second).any(1)
    if differ.any():
        at = int(differ.int().argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), x.shape))
        raise AssertionError(
            f"{int(differ.sum())} of {x.numel()} elements differ{what}, the first at {place}: "
            f"{x.flatten()[at].item()} against {y.flatten()[at].item()}"
        )


def get_arch_major() -> int:
    """Compute capability, whole part; 9 without a GPU, since it is SM90's set that is here."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9
