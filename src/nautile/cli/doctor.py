"""``nautile doctor``: this machine, its versions, its measured speed, and whether it will do."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nautile.cli.flags import parse
from nautile.core import machine

EXAMPLES = ("nautile doctor", "nautile doctor --json > machine.json")

LEAST_MEMORY = 3e9
"""Bytes that the demo needs."""
LEAST_DISK = 2e9
"""Bytes that the demo's data, checkpoints and report need, with room to spare."""
BF16_WORTH = 1.2
"""Speed over float32 from which bfloat16 autocast pays for its casts."""


@dataclass(frozen=True)
class DoctorArgs:
    """What to measure and how to print it."""

    json: bool = False
    """Print one JSON object instead of lines."""
    seconds: float = 1.0
    """How long each measurement runs; what else runs on the machine meanwhile lowers the figures."""


@dataclass(frozen=True)
class Verdict:
    """One judgement about the machine."""

    good: bool
    """Whether the demo can run in spite of it."""
    text: str
    """The judgement and its reason."""


def main(argv: Sequence[str]) -> int:
    """Examine, print; exit code 1 if something stands in the demo's way."""
    description = "This machine, its versions, its measured speed, and a verdict."
    args = parse(DoctorArgs, None, argv, "nautile doctor", description, EXAMPLES)
    findings = examine(args.seconds, Path("runs"))
    verdicts = judge(findings)
    if args.json:
        print(json.dumps({**findings, "verdicts": [vars(verdict) for verdict in verdicts]}, indent=2))
    else:
        print("\n".join([*_lines(findings), "", *(f"{_mark(verdict)} {verdict.text}" for verdict in verdicts)]))
    return 0 if all(verdict.good for verdict in verdicts) else 1


def examine(seconds: float, runs: Path) -> dict[str, Any]:
    """What the machine is and what it measures, as plain JSON values.

    Args:
        seconds: length of each of the three measurements.
        runs: the folder that runs are written to.
    """
    return {
        **machine.describe(),
        "free_disk_bytes": machine.free_disk_bytes(runs.absolute()),
        "gemm_gflops": {
            dtype: round(machine.measure_gemm_peak(dtype, seconds), 1) for dtype in ("float32", "bfloat16")
        },
        "read_gbytes_per_second": round(machine.measure_read_bandwidth(seconds), 1),
    }


def judge(findings: dict[str, Any]) -> list[Verdict]:
    """What the findings mean for the demo."""
    return [
        _enough("memory", findings["memory_bytes"], LEAST_MEMORY),
        _enough("free disk", findings["free_disk_bytes"], LEAST_DISK),
        _threads(findings["threads"], findings["cores"]),
        _precision(findings["gemm_gflops"]),
    ]


def _enough(what: str, have: float, need: float) -> Verdict:
    relation = "enough for" if have >= need else f"less than the {need / 1e9:.0f} GB of"
    return Verdict(have >= need, f"{what}: {have / 1e9:.1f} GB, {relation} nautile demo")


def _threads(threads: int, cores: int) -> Verdict:
    if threads <= cores:
        return Verdict(True, f"threads: torch uses {threads} of {cores} cores")
    return Verdict(True, f"threads: torch uses {threads} on {cores} cores, which is slow: set OMP_NUM_THREADS={cores}")


def _precision(gflops: dict[str, float]) -> Verdict:
    gain = gflops["bfloat16"] / gflops["float32"]
    advice = "train in bfloat16" if gain >= BF16_WORTH else "train in float32"
    return Verdict(True, f"precision: bfloat16 products run at {gain:.1f} times float32's speed, so {advice}")


def _lines(findings: dict[str, Any]) -> list[str]:
    flops, native = findings["gemm_gflops"], findings["bf16_instructions"]
    rows = {
        "processor": f"{findings['cpu']}, {findings['cores']} cores, {findings['cpu_capability']}",
        "bf16": ", ".join(native) if native else "no instructions of its own: emulated",
        "accelerator": ", ".join(findings["accelerators"]) or "none",
        "memory": f"{findings['memory_bytes'] / 1e9:.1f} GB, read at {findings['read_gbytes_per_second']} GB/s",
        "disk": f"{findings['free_disk_bytes'] / 1e9:.1f} GB free",
        "products": f"{flops['float32']:.0f} GFLOP/s float32, {flops['bfloat16']:.0f} GFLOP/s bfloat16",
        "system": f"{findings['system']}, Python {findings['python']}",
        "versions": ", ".join(f"{name} {version}" for name, version in findings["versions"].items()),
    }
    return [f"{label:<12} {text}" for label, text in rows.items()]


def _mark(verdict: Verdict) -> str:
    return "ok     " if verdict.good else "problem"
