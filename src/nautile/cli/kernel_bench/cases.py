"""The cases: DeepSeek's own shapes on a GPU, the same kinds of work in sizes of a CPU elsewhere.

Each says what it must compute and move at least, and what one would call instead. Data are random normal: a GPU draws
less power, and runs faster, on zeros.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

COLD_BYTES = 128 << 20
"""Far more than a CPU's last-level cache."""


@dataclass(frozen=True)
class Ready:
    """Tensors made, ready to run."""

    run: Callable[[], object]
    example: Tensor
    """What decides which backend runs."""
    flops: float
    moved: float
    """Bytes that must be read and written at least."""
    factors: str
    """Type of the factors of the products, for the roofline."""
    baseline: Callable[[], object] | None = None
    baseline_name: str = ""


@dataclass(frozen=True)
class Case:
    """One measurement."""

    op: str
    shape: str
    make: Callable[[torch.device], Ready]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """What to measure on `device`: with `quick` a selection, in the same order."""
    from nautile.cli.kernel_bench import attention, experts, products, quantizers

    small = device.type == "cpu"
    return [case for topic in (products, experts, quantizers, attention) for case in topic.cases(small, quick)]


def nbytes(*tensors: Tensor) -> int:
    """Bytes of all of them."""
    return sum(x.numel() * x.element_size() for x in tensors)


def copies(device: torch.device, size: int) -> int:
    """How many operands of `size` bytes to take in turns, so that none is in a CPU's cache when it is read again.

    On a GPU one: there the timer flushes the cache.
    """
    return -(-COLD_BYTES // size) if device.type == "cpu" else 1


def in_turns(works: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Runs the next one with each call."""
    turn = cycle(works)
    return lambda: next(turn)()
