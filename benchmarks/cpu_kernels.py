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
EXPERTS = {"V2-Lite": (2048, 1408, 32, 6), "V3 / 8": (7168, 256, 32, 8)}
"""D, F, E, K; half of V2-Lite's experts, and an eighth of the width and of the number of V3's."""
LATENT, ROPE = 512, 64
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


def mla_decode(rounds: int) -> list[Row]:
    """Absorbed attention of one new token to a cache, torch's products beside it.

    A row of C + R numbers costs 2 H (2 C + R) operations: which limit a head count meets depends on the machine, so
    the row says how much of the nearer one is reached.
    """
    found = []
    peaks = {dtype: 1e9 * measure_gemm_peak(dtype) for dtype in (torch.bfloat16, torch.float32)}
    for dtype, peak in peaks.items():
        for T in (1024, 8192, 32768):
            size = T * (LATENT + ROPE) * dtype.itemsize
            cache = torch.randn(1, T, LATENT + ROPE).to(dtype)
            caches = [x.split((LATENT, ROPE), -1) for x in copies(cache)]
            at = torch.tensor([[T - 1]])
            for H in (1, 4, 16, 64, 128):
                q = torch.randn(1, 1, H, LATENT + ROPE).to(dtype)
                q_c, q_rope = q.split((LATENT, ROPE), -1)
                work: Work = {
                    "torch": (caches, lambda c, q=q: products_over_latents(q, *c)),
                    "native": (
                        caches,
                        lambda c, q=q_c, r=q_rope, at=at: ops.latent_attention(q, r, c[0], c[1], at, 0.1),
                    ),
                }
                times = paired(work, rounds)
                flop = 2 * H * T * (2 * LATENT + ROPE)
                row: Row = {"dtype": str(dtype), "context": T, "heads": H}
                row |= speed(times, "native", "torch", size, flop)
                compute = flop / peak / statistics.median(times["native"])
                row |= {
                    "of_gemm_peak": round(compute, 3),
                    "bound": "memory" if row["of_read_bandwidth"] > compute else "compute",
                }
                found.append(row)
    return found


def products_over_latents(q_BSHX: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor) -> Tensor:
    """The same as three products of torch's and a softmax."""
    q_HC, q_HR = q_BSHX[0, 0].split((LATENT, ROPE), -1)
    c_TC, k_TR = c_BTC[0], k_rope_BTR[0]
    scores_HT = torch.addmm(q_HR @ k_TR.t(), q_HC, c_TC.t()).mul_(0.1)
    return torch.softmax(scores_HT, -1) @ c_TC


def expert_decode(rounds: int) -> list[Row]:
    """Routed experts of a few tokens: only the chosen ones' bytes count as read. Stored and packed weights."""
    found = []
    for name, (D, hidden, E, K) in EXPERTS.items():
        gate_up, down = torch.randn(E, 2 * hidden, D), torch.randn(E, D, hidden)
        stored = {dtype: (gate_up.to(dtype), down.to(dtype)) for dtype in (torch.bfloat16, torch.float32)}
        packed = {
            kind: (ops.pack_weight(gate_up, kind), ops.pack_weight(down, kind)) for kind in ("bf16", "int8", "int4")
        }
        for T in (1, 2, 4, 16):
            choices = [(torch.rand(T, E).topk(K).indices, torch.rand(T, K)) for _ in range(8)]
            touched = statistics.mean(len(experts.unique()) for experts, _ in choices)
            for dtype, (up_w, down_w) in stored.items():
                x = torch.randn(T, D).to(dtype)
                work: Work = {
                    "torch": (choices, lambda c, x=x, u=up_w, d=down_w: per_expert(x, u, d, *c)),
                    "native": (choices, lambda c, x=x, u=up_w, d=down_w: ops.grouped_swiglu(x, u, d, *c)),
                }
                sizes = {"native": int(touched * 3 * D * hidden * dtype.itemsize)}
                if dtype == torch.bfloat16:
                    for kind, both in packed.items():
                        work[kind] = (choices, lambda c, x=x, p=both: ops.packed_experts(x, *p, *c))
                        sizes[kind] = int(touched * (both[0][0].nbytes + both[1][0].nbytes))
                times = paired(work, rounds)
                for kind, size in sizes.items():
                    row = {"experts": name, "shape": [E, D, hidden], "tokens": T, "dtype": str(dtype), "weights": kind}
                    found.append(row | speed(times, kind, "torch", size, 6 * T * K * D * hidden))
    return found


def per_expert(x_TD: Tensor, gate_up: Tensor, down: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Each chosen expert by torch's products, on its tokens."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
    for e in experts_TK.unique().tolist():
        token, k = (experts_TK == e).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token], gate_up[e]).chunk(2, -1)
        y_TD.index_add_(0, token, F.linear(F.silu(gate).mul_(up), down[e]).float() * weights_TK[token, k, None])
    return y_TD.to(x_TD.dtype)


def expert_training(rounds: int) -> list[Row]:
    """Forward and backward of the routed experts in bfloat16, beside grouped products as torchtitan arranges them."""
    found = []
    for T, D, hidden, E, K in (
        (2048, 512, 256, 16, 4),
        (2048, 1024, 512, 16, 4),
        (4096, 768, 384, 32, 6),
        (1024, 2048, 1408, 16, 6),
    ):
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [
                torch.randn(*shape).mul_(shape[-1] ** -0.5).bfloat16().requires_grad_()
                for shape in ((T, D), (E, 2 * hidden, D), (E, D, hidden), (T, K))
            ]
            experts, grad = torch.rand(T, E).topk(K).indices, torch.randn(T, D).bfloat16()
            x, gate_up, down, weights = leaves

            def step(
                run: Callable[..., Tensor], x=x, gate_up=gate_up, down=down, experts=experts, weights=weights, grad=grad
            ) -> None:
                with torch.inference_mode(False), torch.enable_grad():
                    torch.autograd.grad(run(x, gate_up, down, experts, weights), (x, gate_up, down, weights), grad)

            times = paired({"torch": ([grouped_products], step), "ours": ([ops.grouped_swiglu], step)}, rounds)
        row = {"tokens": T, "shape": [E, D, hidden], "choices": K}
        found.append(row | speed(times, "ours", "torch", 0, 18 * T * K * D * hidden))
    return found


def grouped_products(x_TD: Tensor, gate_up: Tensor, down: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Sort, torch._grouped_mm, SwiGLU, torch._grouped_mm, and a weighted sum in float32."""
    choice, K = experts_TK.flatten(), experts_TK.shape[1]
    order = choice.argsort(stable=True)
    ends = torch.bincount(choice, minlength=len(down)).cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(x_TD[order // K], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    out = out.float() * weights_TK.flatten()[order, None].float()
    return torch.zeros(x_TD.shape, dtype=torch.float32).index_add(0, order // K, out).to(x_TD.dtype)


SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "packed_products": packed_products,
    "decode_projections": decode_projections,
    "norms": norms,
    "mla_decode": mla_decode,
    "expert_decode": expert_decode,
    "expert_training": expert_training,
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
