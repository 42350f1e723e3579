"""Measures the cases of one device and puts them beside the roofline."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nautile.cli.kernel_bench import roofline
from nautile.cli.kernel_bench.cases import Case, cases
from nautile.cli.kernel_bench.timing import Timer
from nautile.core.errors import UserError
from nautile.core.machine import describe
from nautile.ops.dispatch import backend_for


@dataclass(frozen=True)
class Measured:
    """One case, measured."""

    op: str
    shape: str
    backend: str
    """The backend that ran, see `nautile ops`."""
    microseconds: float
    """Median of one call."""
    tflops: float
    """10¹² floating-point operations per second; a multiply-add is two."""
    gbytes_per_second: float
    """10⁹ bytes per second of what the op must read and write at least."""
    of_roofline: float
    """Shortest time that the machine's measured limits allow, over the time taken."""
    baseline: str | None
    """What one would call instead; None where torch has nothing for the job."""
    baseline_microseconds: float | None
    times_as_fast: float | None
    """Time of the baseline over ours, run in turns."""


def report(
    device: torch.device,
    *,
    quick: bool,
    only: str | None = None,
    seconds: float | None = None,
    each: Callable[[Measured], None] = lambda measured: None,
) -> dict[str, Any]:
    """Measure and return plain JSON values: machine, roofline and one row per case.

    Args:
        device: Where to measure.
        quick: Only the cases marked quick.
        only: Only cases whose op or shape contains this.
        seconds: About how long each case is measured; None for 0.3 (quick) or 2.
        each: Is told each case as soon as it is measured.

    Raises:
        UserError: No case contains `only`.
    """
    chosen = [case for case in cases(device, quick) if only is None or only in f"{case.op} {case.shape}"]
    if not chosen:
        names = ", ".join(sorted({case.op for case in cases(device, quick)}))
        raise UserError(f"no case contains {only!r}", "--only picks among the measured ops and shapes", f"ops: {names}")
    seconds = seconds or (0.3 if quick else 2.0)
    limits, timer = roofline.measure(device, min(seconds, 1.0)), Timer(device, seconds)
    rows = []
    for case in chosen:
        torch.manual_seed(0)
        measured = measure(case, device, timer, limits)
        each(measured)
        rows.append(measured)
    return {
        "benchmark": "kernels",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else describe()["cpu"],
        "machine": describe(),
        "roofline": asdict(limits),
        "data": "random normal",
        "rows": [asdict(row) for row in rows],
    }


def measure(case: Case, device: torch.device, timer: Timer, limits: roofline.Roofline) -> Measured:
    """One case: ours and its baseline in turns."""
    ready = case.make(device)
    works = [ready.run] if ready.baseline is None else [ready.run, ready.baseline]
    ours, *theirs = timer.medians(*works)
    return Measured(
        op=case.op,
        shape=case.shape,
        backend=backend_for(case.op, ready.example),
        microseconds=ours * 1e6,
        tflops=ready.flops / ours / 1e12,
        gbytes_per_second=ready.moved / ours / 1e9,
        of_roofline=limits.seconds(ready.flops, ready.moved, ready.factors) / ours,
        baseline=ready.baseline_name if theirs else None,
        baseline_microseconds=theirs[0] * 1e6 if theirs else None,
        times_as_fast=theirs[0] / ours if theirs else None,
    )
