"""Training speed on a CPU: nautile beside transformers, same weights, same batches, alternating runs.

    python benchmarks/train_cpu.py --threads 2 > benchmarks/results/train_cpu.json

First every contender trains alone for a few steps; then our fastest setting meets the three fastest of transformers:
processes that wait on a pipe while another one trains, so that a disturbed machine disturbs all alike. The ratio is
the median over rounds of the paired ratios to the fastest of the three. Contenders named `kept-memory` run with a C
allocator that never returns memory to the system, which spares an engine with large temporaries a quarter of its time
in page faults. One JSON document on stdout.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

BATCH, SEQUENCE = 8, 512
CONTENDERS = (
    # engine, precision, then: experts implementation, torch.compile, allocator
    "nautile fp32",
    "nautile bf16",
    "transformers fp32 eager",
    "transformers fp32 grouped_mm",
    "transformers fp32 eager compile",
    "transformers bf16 eager",
    "transformers bf16 grouped_mm",
    "transformers bf16 eager kept-memory",
    "transformers bf16 eager compile",
    "transformers bf16 grouped_mm compile",
    "transformers bf16 eager compile kept-memory",
)
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
LEARNING_RATE = 1e-5
"""So small that routing stays as the initial weights spread it: without balancing, a larger one sends all tokens to
four experts within ten steps, and big even batches per expert flatter every engine."""
CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 640,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
}


def main() -> None:
    """Measure and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each contender alone")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps of each contender")
    parser.add_argument("--rounds", type=int, default=7, help="alternations of the finalists")
    parser.add_argument("--only", nargs="*", default=CONTENDERS, help=f"contenders, of: {', '.join(CONTENDERS)}")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, args.model, args.threads)
    else:
        print(json.dumps(compare(args), indent=2))


# --- the measuring side -------------------------------------------------------------------------------------------


class Contender:
    """A worker process: `ask` sends it a command and waits for its answer."""

    def __init__(self, name: str, model: str, threads: int, warmup: int) -> None:
        command = [sys.executable, __file__, "--worker", name, "--model", model, "--threads", str(threads)]
        # Threads that sleep at barriers: on a busy machine spinning ones wait for each other, and all lose alike.
        env = {**os.environ, "OMP_WAIT_POLICY": "passive", **(KEPT_MEMORY if "kept-memory" in name else {})}
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.first_losses: list[float] = self.ask({"do": "train", "steps": warmup})["losses"]

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """One answer per command."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self.process.wait()}")
        return json.loads(line)

    def seconds(self, steps: int) -> list[float]:
        """Seconds of each of the next steps."""
        return self.ask({"do": "train", "steps": steps})["seconds"]

    def stop(self) -> float:
        """End the process; its peak memory in MiB."""
        peak = self.ask({"do": "stop"})["peak_rss_mib"]
        self.process.wait()
        return peak


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Every contender alone, then the finalists in turn."""
    from nautile.core.machine import describe

    peaks = {"fp32": 0.0, "bf16": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        counts = write_model(Path(folder))
        rows = {}
        for name in args.only:
            # Measured again beside every contender: a moment of other load must not lower the bar.
            peaks = {precision: max(peak, gemm_peak(precision, args.threads)) for precision, peak in peaks.items()}
            rows[name] = alone(name, folder, args, counts)
        for name, row in rows.items():
            row["fraction_of_gemm_peak"] = round(row["gflops"] / peaks["bf16" if "bf16" in name else "fp32"], 3)
        check_losses({name: row["first_losses"] for name, row in rows.items()})
        final = meet(rows, folder, args)
    return {
        "benchmark": "train_cpu",
        "commit": commit(),
        "machine": describe(),
        "threads": args.threads,
        "config": CONFIG,
        "batch": [BATCH, SEQUENCE],
        "counts": counts,
        "gemm_peak_gflops": {precision: round(peak, 1) for precision, peak in peaks.items()},
        "alone": rows,
        **final,
    }


def commit() -> str:
    """The commit that this file belongs to, with a mark if the tree has changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def alone(name: str, folder: str, args: argparse.Namespace, counts: dict[str, int]) -> dict[str, Any]:
    """Speed and memory of one contender with the machine to itself."""
    contender = Contender(name, folder, args.threads, args.warmup)
    step = statistics.median(contender.seconds(args.steps))
    gflops = counts["flops_per_token"] * BATCH * SEQUENCE / step / 1e9
    row = {
        "tokens_per_second": round(BATCH * SEQUENCE / step),
        "gflops": round(gflops, 1),
        "first_losses": contender.first_losses,
        "peak_rss_mib": round(contender.stop()),
    }
    print(f"{name}: {row['tokens_per_second']} tokens/s, {row['peak_rss_mib']} MiB", file=sys.stderr)
    return row


def check_losses(losses: dict[str, list[float]]) -> None:
    """Refuse to compare engines that do not train the same model."""
    anchor_name = next(iter(losses))
    for name, values in losses.items():
        both_fp32 = "fp32" in name and "fp32" in anchor_name
        for step, (want, got) in enumerate(zip(losses[anchor_name], values, strict=True)):
            if abs(got - want) > (1e-4 if both_fp32 else 1e-3) * abs(want):
                raise SystemExit(f"step {step}: loss {got} of {name} is not {want} of {anchor_name}")


def meet(rows: dict[str, Any], folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Our fastest setting against transformers' three fastest, one step each in turn."""
    by_speed = sorted(rows, key=lambda name: -rows[name]["tokens_per_second"])
    ours = next(name for name in by_speed if name.startswith("nautile"))
    rivals = [name for name in by_speed if name.startswith("transformers")][:3]
    finalists = [Contender(name, folder, args.threads, args.warmup) for name in (ours, *rivals)]
    seconds: dict[str, list[float]] = {contender.name: [] for contender in finalists}
    for _ in range(args.rounds):
        for contender in finalists:
            seconds[contender.name] += contender.seconds(1)
    memory = {contender.name: round(contender.stop()) for contender in finalists}
    rival = min(rivals, key=lambda name: statistics.median(seconds[name]))
    ratios = [theirs / mine for theirs, mine in zip(seconds[rival], seconds[ours], strict=True)]
    return {
        "in_turn": {
            name: {
                "tokens_per_second": round(BATCH * SEQUENCE / statistics.median(steps)),
                "peak_rss_mib": memory[name],
            }
            for name, steps in seconds.items()
        },
        "best": [ours, rival],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_of_rounds": [round(ratio, 3) for ratio in ratios],
        "memory_ratio": round(memory[ours] / memory[rival], 3),
    }


def gemm_peak(dtype: str, threads: int) -> float:
    """GFLOP/s of the best of a few large square products."""
    import torch

    torch.set_num_threads(threads)
    n = 2048
    a = torch.randn(n, n).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e9


def write_model(folder: Path) -> dict[str, int]:
    """Random weights in the published layout, which both engines read. Returns parameter and FLOP counts."""
    import torch

    from nautile.models.deepseek_v3.config import DeepseekV3Config
    from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM
    from nautile.models.io import save_model

    config = DeepseekV3Config(**CONFIG)
    model = DeepseekV3ForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for p in model.expert_parameters())
    idle = routed * (1 - config.num_experts_per_tok / config.n_routed_experts)
    active = total - idle - model.model.embed_tokens.weight.numel()
    qk_v = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    # Causal: a token meets half of the sequence on average. Forward 2, backward 4 FLOPs per multiply-add.
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * qk_v * SEQUENCE / 2
    return {"parameters": total, "active_parameters": round(active), "flops_per_token": round(6 * active + attention)}


# --- the training side --------------------------------------------------------------------------------------------


def serve(name: str, model: str, threads: int) -> None:
    """Obey commands from stdin until told to stop."""
    import torch

    answers, sys.stdout = sys.stdout, sys.stderr  # engines print where they like
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = trainer(name.split(), model)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "stop":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps({"peak_rss_mib": peak}), file=answers, flush=True)
            return
        print(json.dumps(timed(step, command["steps"])), file=answers, flush=True)


def timed(step: Callable[[], float], steps: int) -> dict[str, list[float]]:
    """Seconds and loss of each step."""
    seconds, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "losses": losses}


def trainer(words: list[str], folder: str) -> Callable[[], float]:
    """One optimiser step of the named contender: forward, loss, backward, clip, AdamW."""
    import torch

    model, loss_of = (nautile_loss if words[0] == "nautile" else transformers_loss)(words, folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    stream = batches()

    def step() -> float:
        tokens_BW = next(stream)
        with torch.autocast("cpu", torch.bfloat16) if "bf16" in words else nullcontext():
            loss = loss_of(tokens_BW)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def batches() -> Iterator[Any]:
    """Deterministic [B, S + 1] token ids with a Zipf-like frequency, as text has."""
    import torch

    generator = torch.Generator().manual_seed(1)
    frequency = 1.0 / torch.arange(1, CONFIG["vocab_size"] + 1)
    while True:
        ids = torch.multinomial(frequency, BATCH * (SEQUENCE + 1), replacement=True, generator=generator)
        yield ids.view(BATCH, SEQUENCE + 1)


def nautile_loss(words: list[str], folder: str) -> tuple[Any, Callable[[Any], Any]]:
    """Ours, as nautile.train does it: hidden states, then the chunked loss."""
    from nautile import ops
    from nautile.core.context import ForwardContext
    from nautile.models.io import load_model

    model = load_model(folder).train()

    def loss_of(tokens_BW: Any) -> Any:
        hidden_BSD = model.hidden(ForwardContext.for_tokens(tokens_BW[:, :-1])).hidden_BSD
        targets = tokens_BW[:, 1:].flatten()
        return ops.linear_cross_entropy(hidden_BSD.flatten(0, 1), model.lm_head.weight, targets) / targets.numel()

    return model, loss_of


def transformers_loss(words: list[str], folder: str) -> tuple[Any, Callable[[Any], Any]]:
    """Theirs, with its own loss."""
    import torch
    from transformers import AutoModelForCausalLM

    experts = "grouped_mm" if "grouped_mm" in words else "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=experts).train()
    forward = torch.compile(model) if "compile" in words else model

    def loss_of(tokens_BW: Any) -> Any:
        inputs, targets = tokens_BW[:, :-1], tokens_BW[:, 1:].contiguous()
        return forward(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss

    return model, loss_of


if __name__ == "__main__":
    main()
