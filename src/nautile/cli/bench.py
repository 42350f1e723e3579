"""``nautile bench``: our kernels beside the machine's roofline and beside what one would use instead."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from nautile.cli.flags import parse
from nautile.core.errors import UserError

if TYPE_CHECKING:
    from nautile.cli.kernel_bench.run import Measured

EXAMPLES = ("nautile bench kernels --quick", "nautile bench kernels --only mla --out kernels.json")


@dataclass(frozen=True)
class BenchArgs:
    """What to measure."""

    subject: tyro.conf.Positional[Literal["kernels"]]
    """kernels: the ops of `nautile ops`, one after the other, on random normal data."""
    device: str | None = None
    """Device to measure: cpu, cuda, cuda:1, ... Default: cuda if there is one, else cpu."""
    quick: bool = False
    """A few shapes, for less than a minute."""
    only: str | None = None
    """Measure cases whose op or shape contains this text."""
    threads: int | None = None
    """Threads of the CPU. Default: all cores that this process may use."""
    seconds: float | None = None
    """About how long each case is measured. Default: 0.3 with --quick, else 2."""
    json: bool = False
    """Print one JSON object instead of a table."""
    out: Path | None = None
    """Also write that object to this file."""


def main(argv: Sequence[str]) -> int:
    """Measure, print, write."""
    description = (
        "Time, TFLOP/s and GB/s of each op; the fraction of the roofline that the same run measured; and how many "
        "times as fast as the baseline it is: torch's own op for the same job, run in turns with ours."
    )
    args = parse(BenchArgs, None, argv, "nautile bench", description, EXAMPLES)
    if args.seconds is not None and args.seconds <= 0:
        raise UserError(f"--seconds {args.seconds:g} is not possible", "it is a time to measure for", "--seconds 1")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads} is not possible", "something has to work", "--threads 1 or more")
    import torch

    from nautile.cli.kernel_bench.run import report
    from nautile.core.machine import cores
    from nautile.models.placement import torch_device

    torch.set_num_threads(args.threads or cores())
    device = torch_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
    shown = _Lines(quiet=args.json)
    found = report(device, quick=args.quick, only=args.only, seconds=args.seconds, each=shown.add)
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        shown.end(found)
    return 0


class _Lines:
    """One line per case as soon as it is measured."""

    HEAD = ("op", "shape", "backend", "time", "TFLOP/s", "GB/s", "of roofline", "baseline", "times as fast")
    WIDTHS = (26, 44, 9, 10, 8, 8, 11, 24, 13)

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        if not quiet:
            print(self._line(self.HEAD), flush=True)

    def add(self, m: "Measured") -> None:
        if self.quiet:
            return
        cells = (
            m.op,
            m.shape,
            m.backend,
            f"{m.microseconds:,.0f} us",
            f"{m.tflops:.3f}" if m.tflops else "",
            f"{m.gbytes_per_second:.1f}",
            f"{m.of_roofline:.0%}",
            m.baseline or "",
            f"{m.times_as_fast:.2f}" if m.times_as_fast else "",
        )
        print(self._line(cells), flush=True)

    def end(self, found: dict[str, Any]) -> None:
        roofline = found["roofline"]
        peaks = ", ".join(f"{name} {flops / 1e12:.3g}" for name, flops in roofline["flops_per_second"].items())
        print(
            f"\nroofline, measured in this run: read {roofline['bytes_per_second'] / 1e9:.1f} GB/s; "
            f"products in TFLOP/s: {peaks}. Its fraction is the larger of FLOP and bytes over time, at these limits."
        )

    def _line(self, cells: Sequence[str]) -> str:
        return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, self.WIDTHS, strict=True)).rstrip()
