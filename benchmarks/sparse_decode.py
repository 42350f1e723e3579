"""One decode step of sparse attention beside dense attention, over contexts of several lengths.

    python benchmarks/sparse_decode.py > benchmarks/results/sparse_decode.json

One attention layer with every size as published for DeepSeek-V3.2 (128 heads, latents of 512 + 64, 64 indexer heads of
128 dimensions) reads one new token over a filled cache, in float32, dense and sparse alternately. Two series: growing
contexts at the published top-k, and growing top-k at one context. Beside the time of the whole layer, that of its
parts: scores of the indexer, selection, gathered attention; and for the dense layer, attention over all rows. Slopes of
straight lines through the parts say what one more row of context and one more selected row cost. Each time is the
fastest of several passes over all points, since what disturbs a machine only adds. One JSON document on stdout.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nautile import ops
from nautile.core.context import ForwardContext
from nautile.core.machine import describe, measure_gemm_peak, measure_read_bandwidth
from nautile.infer.cache import KVCache
from nautile.layers.attention.mla import MLA
from nautile.layers.attention.sparse_mla import SparseMLA
from nautile.models.deepseek_v32.config import V32_685B, DeepseekV32Config
from nautile.models.deepseek_v32.model import indexer
from nautile.models.wiring import latent_attention

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
TOPKS = (256, 512, 1024, 2048, 4096, 8192, 16384)
FLOAT = 4
"""Bytes of a float32."""


def main() -> None:
    """Measure and print both series."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8, help="passes over all points")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each kind at each point and pass")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="contexts of the first series")
    parser.add_argument("--topks", type=int, nargs="+", default=TOPKS, help="selections of the second series")
    parser.add_argument("--context", type=int, default=32768, help="context of the second series")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    json.dump(measure(args), sys.stdout, indent=2)
    print()


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The document."""
    longest = max(*args.lengths, args.context)
    bench = Bench(V32_685B, longest, args.repeats)
    points = [*((T, V32_685B.index_topk) for T in args.lengths), *((args.context, k) for k in args.topks)]
    rounds = [[bench.point(*point) for point in points] for _ in range(args.rounds)]
    found = [fastest(same) for same in zip(*rounds, strict=True)]
    by_length, by_topk = found[: len(args.lengths)], found[len(args.lengths) :]
    sparse = [row for row in by_length if row["context"] > V32_685B.index_topk]
    return {
        "benchmark": "sparse_decode",
        "commit": commit(),
        "machine": describe(),
        "gemm_peak_gflops": round(measure_gemm_peak(), 1),
        "read_bandwidth_gb_per_s": round(measure_read_bandwidth(), 1),
        "dtype": "float32",
        "by_length": by_length,
        "by_topk": by_topk,
        "microseconds_per_row": {
            "dense attention, per row of context": slope(by_length, "context", "dense attention"),
            "index scores, per row of context": slope(sparse, "context", "index scores"),
            "selection, per row of context": slope(sparse, "context", "selection"),
            "gathered attention, per row of context": slope(sparse, "context", "gathered attention"),
            "gathered attention, per selected row": slope(by_topk, "topk", "gathered attention"),
        },
    }


class Bench:
    """A dense and a sparse layer with the same weights, and one filled cache for both.

    Args:
        c: Shape of the layer.
        longest: Rows of the cache.
        repeats: Timed steps of each kind.
    """

    def __init__(self, c: DeepseekV32Config, longest: int, repeats: int) -> None:
        torch.manual_seed(0)
        self.repeats = repeats
        self.sparse, self.dense = latent_attention(c, 0, indexer(c)), latent_attention(c, 0)
        for parameter in self.sparse.parameters():
            parameter.normal_(0.0, 1.0).mul_(parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0)
        shared = {name: tensor for name, tensor in self.sparse.state_dict().items() if "indexer" not in name}
        self.dense.load_state_dict(shared, assign=True)
        self.cache = KVCache([self.sparse.cache_spec()], 1, torch.float32)
        self.cache.reserve(longest)
        for rows in self.cache.layers[0].values():
            rows.normal_()
        self.x = torch.randn(1, 1, c.hidden_size)

    def point(self, T: int, topk: int) -> dict[str, Any]:
        """Times at one context length, in milliseconds, with what had to be computed and read."""
        self.cache.reserve(T)
        self.sparse.indexer.topk = topk
        ctx = ForwardContext(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[T - 1]]), cache=self.cache)
        work: dict[str, Callable[[], object]] = {
            "dense layer": lambda: self.dense(self.x, replace(ctx, cache=Latents(self.cache))),
            "sparse layer": lambda: self.sparse(self.x, ctx),
            **self.parts(ctx, T, topk),
        }
        return {"context": T, "topk": topk, "milliseconds": timed(work, self.repeats), **counts(self.sparse, T, topk)}

    def parts(self, ctx: ForwardContext, T: int, topk: int) -> dict[str, Callable[[], object]]:
        """The steps that depend on T or on the selection, alone."""
        layer, index = self.sparse, self.sparse.indexer
        c, k_rope, k_index = (self.cache.layers[0][name][:, :T] for name in ("c_kv", "k_rope", "k_index"))
        angles = layer.rope.cos_sin(ctx.positions_BS)
        source = layer.query_source(self.x)
        q_nope, q_rope = layer.queries(source, angles)
        q_absorbed = torch.einsum("bshn,hnc->bshc", q_nope, layer.up_projections()[0])
        seen = torch.ones(1, 1, T, dtype=torch.bool)
        found: dict[str, Callable[[], object]] = {"dense attention": dense_rows(q_absorbed, q_rope, c, k_rope, layer)}
        if topk >= T:
            return found
        q_index, weights = index.queries(source, angles), index.weights(self.x)
        scores = ops.index_scores(q_index, k_index, weights)
        rows = ops.top_rows(scores, seen, topk)
        return found | {
            "index scores": lambda: ops.index_scores(q_index, k_index, weights),
            "selection": lambda: ops.top_rows(scores, seen, topk),
            "gathered attention": lambda: ops.gathered_attention(q_absorbed, q_rope, c, k_rope, rows, layer.scale),
        }


class Latents:
    """A cache without index keys, as the dense layer declares it."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def update(self, layer: int, positions_BS: torch.Tensor, **entries: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `KVCache.update`, without touching what was not given."""
        rows = self.cache.layers[layer]
        for name, entry in entries.items():
            rows[name][0, positions_BS[0]] = entry[0]
        return {name: rows[name][:, : self.cache.visible] for name in entries}


def dense_rows(
    q_BSHC: torch.Tensor, q_rope_BSHR: torch.Tensor, c_BTC: torch.Tensor, k_rope_BTR: torch.Tensor, layer: MLA
) -> Callable[[], torch.Tensor]:
    """Attention of one query over all rows, as plain products."""

    def attend() -> torch.Tensor:
        q_HC, q_rope_HR, c_TC, k_rope_TR = q_BSHC[0, 0], q_rope_BSHR[0, 0], c_BTC[0], k_rope_BTR[0]
        scores_HT = torch.addmm(q_rope_HR @ k_rope_TR.t(), q_HC, c_TC.t()).mul_(layer.scale)
        return torch.softmax(scores_HT, -1) @ c_TC

    return attend


def timed(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of the fastest run of each, all taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first round is a warm-up
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(min(times), 3) for name, times in taken.items()}


def fastest(same: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One point out of what several passes found for it."""
    times = [point["milliseconds"] for point in same]
    return {**same[0], "milliseconds": {name: min(found[name] for found in times) for name in times[0]}}


def counts(layer: SparseMLA, T: int, topk: int) -> dict[str, dict[str, float]]:
    """Arithmetic and cache traffic of one step, without the projections, which do not depend on T."""
    index, H = layer.indexer, layer.n_heads
    row = layer.kv_lora_rank + layer.rope_dim
    per_row = 2 * H * (2 * layer.kv_lora_rank + layer.rope_dim)
    per_score = 2 * index.n_heads * index.head_dim + 2 * index.n_heads
    selective = topk < T
    return {
        "mflop": {
            "dense attention": per_row * T / 1e6,
            "index scores": per_score * T / 1e6 if selective else 0.0,
            "gathered attention": per_row * min(topk, T) / 1e6,
        },
        "cache_mib_read": {
            "dense attention": FLOAT * row * T / 2**20,
            "index scores": FLOAT * index.head_dim * T / 2**20 if selective else 0.0,
            "gathered attention": FLOAT * row * min(topk, T) / 2**20,
        },
    }


def slope(points: Sequence[dict[str, Any]], of: str, part: str) -> float:
    """Microseconds per unit of `of`: least squares through the points that have this part."""
    pairs = [(row[of], 1e3 * row["milliseconds"][part]) for row in points if part in row["milliseconds"]]
    if len(pairs) < 2:
        return 0.0
    return round(statistics.linear_regression(*zip(*pairs, strict=True)).slope, 4)


def commit() -> str:
    """The commit that this file belongs to, with a mark if the tree has changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
