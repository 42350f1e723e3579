"""Native kernels for CPUs beside torch's own and beside plain reading of memory, at sizes of published models.

    python benchmarks/cpu_kernels.py > benchmarks/results/cpu_kernels.json

Everything compared runs in turn, round after round, so that a disturbance meets all alike; a time is the median over
rounds, a ratio the median of the ratios within a round. Weights are several copies, far larger than the last-level
cache, and every copy is used once in a run. `read` is a sum over 256 MiB, as `nautile doctor` measures the memory:
what a kernel reaches of it in the same rounds is its `of_read_bandwidth`. One JSON document on stdout.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile import ops
from nautile.core.machine import describe, measure_gemm_peak
from nautile.ops.cpu.norm import _RmsNorm

Row = dict[str, Any]
Work = dict[str, tuple[list[Any], Callable[[Any], object]]]
"""Name → what is called for one thing after the other."""

PROJECTIONS = {
    "V3 latent and query down": (7168, 2112),
    "V2-Lite dense gate": (2048, 10944),
    "V2 query down": (5120, 1536),
    "V3 query up": (1536, 24576),
}
"""[inputs → outputs] of published layers."""
ROWS = (1, 2, 4, 8, 16, 32)
COPIES_BYTES = 200 * 10**6
"""Weights of one run."""
READ = torch.ones(2**28 // 4)
"""What `read` sums."""


def main() -> None:
    """Measure the chosen sections and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        sections = {name: SECTIONS[name](args.rounds) for name in args.sections}
    document = {
        "benchmark": "cpu_kernels",
        "commit": commit(),
        "machine": describe(),
        "bf16_gemm_peak_gflops": round(measure_gemm_peak("bfloat16"), 1),
        "rounds": args.rounds,
        "sections": sections,
    }
    json.dump(document, sys.stdout, indent=2)
    print()


def packed_products(rounds: int) -> list[Row]:
    """x Wᵀ with packed weights of 16, 8 and 4 bits, and torch's bfloat16 product."""
    found = []
    for name, (D, N) in PROJECTIONS.items():
        weights = copies(torch.randn(N, D).bfloat16())
        packed = {kind: copies(ops.pack_weight(weights[0], kind)) for kind in ("bf16", "int8", "int4")}
        for M in ROWS:
            x = torch.randn(M, D).bfloat16()
            work: Work = {"torch": (weights, lambda w, x=x: F.linear(x, w))}
            work |= {kind: (some, lambda w, x=x: ops.packed_linear(x, w)) for kind, some in packed.items()}
            times = paired(work, rounds)
            for kind, some in packed.items():
                row = {"weight": name, "shape": [D, N], "rows": M, "kind": kind, "bytes": some[0].nbytes}
                found.append(row | speed(times, kind, "torch", some[0].nbytes, 2 * M * D * N))
    return found


def decode_projections(rounds: int) -> list[Row]:
    """ops.linear and ops.gated_linear on weights as they are stored, and the same of torch."""
    found = []
    for name, (D, N) in PROJECTIONS.items():
        weights = copies(torch.randn(N, D).bfloat16())
        pairs = list(zip(weights[::2], weights[1::2], strict=True))
        for M in ROWS:
            x = torch.randn(M, D).bfloat16()
            times = paired(
                {
                    "torch": (weights, lambda w, x=x: F.linear(x, w)),
                    "linear": (weights, lambda w, x=x: ops.linear(x, w)),
                    "torch gated": (pairs, lambda w, x=x: F.silu(F.linear(x, w[0])).mul_(F.linear(x, w[1]))),
                    "gated_linear": (pairs, lambda w, x=x: ops.gated_linear(x, *w)),
                },
                rounds,
            )
            for op, other, matrices in (("linear", "torch", 1), ("gated_linear", "torch gated", 2)):
                row = {"weight": name, "shape": [D, N], "rows": M, "op": op}
                numbers = matrices * D * N
                found.append(row | speed(times, op, other, 2 * numbers, 2 * M * numbers))
    return found


def norms(rounds: int) -> list[Row]:
    """RMSNorm of a few rows, torch's operators beside it: microseconds, mostly of calls."""
    found = []
    for D in (512, 2048, 7168):
        for M in (1, 16, 128):
            for dtype in (torch.float32, torch.bfloat16):
                xs, weight = [torch.randn(M, D).to(dtype)] * 50, torch.ones(D, dtype=dtype)
                times = paired(
                    {
                        "torch": (xs, lambda x, w=weight, D=D: F.rms_norm(x, (D,), w, 1e-6)),
                        "with a backward": (xs, lambda x, w=weight: _RmsNorm.apply(x, w, 1e-6, x.dtype)),
                        "native": (xs, lambda x, w=weight: ops.rms_norm(x, w, 1e-6)),
                    },
                    rounds,
                )
                micro = {name: round(1e6 * statistics.median(t), 2) for name, t in times.items() if name != "read"}
                row = {"size": D, "rows": M, "dtype": str(dtype), "microseconds": micro}
                found.append(row | {"times_torch": ratio(times["torch"], times["native"])})
    return found


SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "packed_products": packed_products,
    "decode_projections": decode_projections,
    "norms": norms,
}


def copies(first: Any) -> list[Any]:
    """A tensor or packed weight as often as makes it far larger than the caches, an even number of times."""
    again = 2 * max(1, COPIES_BYTES // (2 * first.nbytes)) - 1
    if isinstance(first, Tensor):
        return [first, *(first.clone() for _ in range(again))]
    scale = first.scale
    clones = ((first.data.clone(), None if scale is None else scale.clone()) for _ in range(again))
    return [first, *(replace(first, data=data, scale=scale) for data, scale in clones)]


def paired(work: Work, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call in every round of each, and of reading memory, all taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in [*work, "read"]}
    for turn in range(rounds + 1):
        for name, (some, run) in (work | {"read": ([READ], Tensor.sum)}).items():
            start = time.perf_counter()
            for one in some:
                run(one)
            if turn:  # the first round is a warm-up
                taken[name].append((time.perf_counter() - start) / len(some))
    return taken


def speed(times: dict[str, list[float]], name: str, other: str, size: int, flop: int) -> Row:
    """What a call that reads `size` bytes and makes `flop` operations took."""
    seconds = statistics.median(times[name])
    return {
        "microseconds": round(1e6 * seconds, 1),
        "torch_microseconds": round(1e6 * statistics.median(times[other]), 1),
        "times_torch": ratio(times[other], times[name]),
        "gb_per_s": round(size / seconds / 1e9, 1),
        "read_gb_per_s": round(READ.nbytes / statistics.median(times["read"]) / 1e9, 1),
        "of_read_bandwidth": ratio([t * size / READ.nbytes for t in times["read"]], times[name]),
        "gflops": round(flop / seconds / 1e9, 1),
    }


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of how many times as fast."""
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 3)


def commit() -> str:
    """The commit that this file belongs to, with a mark if the tree has changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
