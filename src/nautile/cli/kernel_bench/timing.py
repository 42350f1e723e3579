"""Timing: ours and the baseline in turns, so that what disturbs the machine disturbs both; medians."""

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]

_FLUSH_BYTES = 256 << 20
"""Written between two runs on a GPU, so that operands come from memory as they would in a model."""
FEWEST, MOST = 3, 200
"""Rounds of one case."""


class Timer:
    """Measures on one device.

    Args:
        device: Where the work runs.
        seconds: About how long one case may take, its warm-up left out.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def median(self, work: Work) -> float:
        """Seconds of one call."""
        return self.medians(work)[0]

    def medians(self, *works: Work) -> list[float]:
        """Seconds of one call of each, run in turns."""
        first = [self._once(work) for work in works]  # compiles, pages in
        first = [self._once(work) for work in works]
        rounds = int(max(FEWEST, min(MOST, self.seconds / max(sum(first), 1e-9))))
        taken = [[self._once(work) for work in works] for _ in range(rounds)]
        return [statistics.median(times) for times in zip(*taken, strict=True)]

    def _once(self, work: Work) -> float:
        if self._flush is None:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
