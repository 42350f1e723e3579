"""Training speed on a CPU: nautile beside transformers, same weights, same batches, alternating runs.

    python benchmarks/train_cpu.py --threads 2 --rounds 5 > benchmarks/results/train_cpu.json

Each contender is a process of its own that stays alive and waits on a pipe while another one trains, so a disturbed
machine disturbs all of them alike and peak memory is counted apart. A contender's speed is the median over its steps;
the ratio is the median over rounds of the paired ratios. The last line printed is one JSON document.
"""

import argparse
import json
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
    # engine, precision, compile, experts, attention
    "nautile fp32",
    "nautile bf16",
    "transformers fp32 eager",
    "transformers fp32 grouped_mm",
    "transformers bf16 eager",
    "transformers bf16 grouped_mm",
    "transformers bf16 eager compile",
    "transformers bf16 grouped_mm compile",
    "transformers fp32 grouped_mm compile",
)
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
    """Measure every contender and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each contender per round")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps of each contender")
    parser.add_argument("--only", nargs="*", help=f"contenders to run, of: {', '.join(CONTENDERS)}")
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

    def __init__(self, name: str, model: str, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", name, "--model", model, "--threads", str(threads)]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask({"do": "start"})

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """One answer per command."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self.process.wait()}")
        return json.loads(line)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run all contenders in turn, round by round."""
    names = args.only or list(CONTENDERS)
    with tempfile.TemporaryDirectory() as folder:
        counts = write_model(Path(folder))
        contenders = []
        losses = {}
        for name in names:
            contender = Contender(name, folder, args.threads)
            losses[name] = contender.ask({"do": "train", "steps": args.warmup})["losses"]
            contenders.append(contender)
            print(f"ready: {name}  first losses {losses[name]}", file=sys.stderr)
        check_losses(losses)
        seconds: dict[str, list[list[float]]] = {name: [] for name in names}
        for _ in range(args.rounds):
            for contender in contenders:
                seconds[contender.name].append(contender.ask({"do": "train", "steps": args.steps})["seconds"])
        ends = {contender.name: contender.ask({"do": "stop"}) for contender in contenders}
    return summary(args, names, counts, losses, seconds, ends)


def check_losses(losses: dict[str, list[float]]) -> None:
    """Refuse to compare engines that do not train the same model."""
    anchor_name = next(iter(losses))
    for name, values in losses.items():
        for step, (a, b) in enumerate(zip(losses[anchor_name], values, strict=True)):
            tolerance = 2e-4 if "fp32" in name and "fp32" in anchor_name else 2e-2
            if abs(a - b) > tolerance * abs(a):
                raise SystemExit(f"step {step}: loss {b} of {name} is not {a} of {anchor_name}")


def summary(args, names, counts, losses, seconds, ends) -> dict[str, Any]:
    """The JSON document."""
    from nautile.core.machine import describe

    tokens = BATCH * SEQUENCE
    peaks = {dtype: gemm_peak(dtype, args.threads) for dtype in ("fp32", "bf16")}
    rows = {}
    for name in names:
        step = statistics.median(s for run in seconds[name] for s in run)
        gflops = counts["flops_per_token"] * tokens / step / 1e9
        peak = peaks["bf16" if "bf16" in name else "fp32"]
        rows[name] = {
            "tokens_per_second": round(tokens / step),
            "seconds_per_step": round(step, 4),
            "spread_of_rounds": [round(tokens / statistics.median(run)) for run in seconds[name]],
            "gflops": round(gflops, 1),
            "fraction_of_gemm_peak": round(gflops / peak, 3),
            "peak_rss_mib": round(ends[name]["peak_rss_mib"]),
            "first_losses": losses[name],
        }
    return {
        "benchmark": "train_cpu",
        "machine": describe(),
        "threads": args.threads,
        "config": CONFIG,
        "batch": [BATCH, SEQUENCE],
        "counts": counts,
        "gemm_peak_gflops": {k: round(v, 1) for k, v in peaks.items()},
        "contenders": rows,
        **ratios(rows, seconds),
    }


def ratios(rows: dict[str, Any], seconds: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Our best setting against transformers' best, by median of the paired rounds."""
    best = {}
    for engine in ("nautile", "transformers"):
        mine = [name for name in rows if name.startswith(engine)]
        if not mine:
            return {}
        best[engine] = max(mine, key=lambda name: rows[name]["tokens_per_second"])
    pairs = zip(seconds[best["transformers"]], seconds[best["nautile"]], strict=True)
    paired = [statistics.median(theirs) / statistics.median(ours) for theirs, ours in pairs]
    return {
        "best": best,
        "ratio": round(statistics.median(paired), 3),
        "ratio_of_rounds": [round(r, 3) for r in paired],
        "memory_ratio": round(rows[best["nautile"]]["peak_rss_mib"] / rows[best["transformers"]]["peak_rss_mib"], 3),
    }


def gemm_peak(dtype: str, threads: int) -> float:
    """GFLOP/s of the best of a few large square products."""
    import torch

    torch.set_num_threads(threads)
    n = 2048
    a = torch.randn(n, n).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e9


def write_model(folder: Path) -> dict[str, float]:
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

    answers = sys.stdout
    sys.stdout = sys.stderr  # engines print where they like
    torch.set_num_threads(threads)
    step: Callable[[], float] | None = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "start":
            torch.manual_seed(0)
            step = trainer(name.split(), model)
            answer: dict[str, Any] = {}
        elif command["do"] == "train":
            assert step is not None
            answer = timed(step, command["steps"])
        else:
            answer = {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        print(json.dumps(answer), file=answers, flush=True)
        if command["do"] == "stop":
            return


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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
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
    attention = "eager" if "eager_attention" in words else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, experts_implementation=experts
    ).train()
    forward = torch.compile(model) if "compile" in words else model

    def loss_of(tokens_BW: Any) -> Any:
        inputs, targets = tokens_BW[:, :-1], tokens_BW[:, 1:].contiguous()
        return forward(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss

    return model, loss_of


if __name__ == "__main__":
    main()
