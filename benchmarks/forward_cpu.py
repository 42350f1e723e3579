"""Prefill speed of every family on a CPU: nautile beside transformers, same weights, same tokens, alternating rounds.

    python benchmarks/forward_cpu.py --threads 2 > benchmarks/results/forward_cpu.json

Per family one process: nautile writes a small random model, both load it, logits of all positions are compared, then
each round gives all engines the same fresh tokens in turn (fresh, since the load of each expert, and with it the shape
of each product, differs from text to text). Transformers runs in every combination of its attention (sdpa, eager) and
expert implementations (eager, grouped_mm; its third, batched_mm, copies the weights of every token's experts, gigabytes
here) and the fastest one counts, chosen anew for every shape. The ratio is the median over rounds of the paired ratios.

`PREFILLS` adds reading one prompt into a cache, as generation begins: our `Batch` against transformers' forward with
`use_cache`, in the setting that was fastest for 1024 tokens; both compute logits after the last position only.

transformers has no DeepSeekMoE; there its Llama gets the mixture of its DeepSeek-V2 in place of the dense layers.
`--compile` adds torch.compile of the fastest setting, which costs minutes. One JSON document on stdout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

SHAPES = ((1, 512), (1, 1024), (4, 256))
"""Batch and sequence of the prompts."""
PREFILLS = {"deepseek_v3": 2048, "qwen2": 2048}
"""Family → tokens of the prompt that is read into a cache."""
COMMON = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "initializer_range": 0.044,  # 1/√512: activations keep their size, so that routers and softmax have opinions
}
MIXTURE = {
    "moe_intermediate_size": 256,
    "n_routed_experts": 32,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
LATENT = {"kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
GROUPS = {"n_group": 4, "topk_group": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek": {**COMMON, **MIXTURE, "num_key_value_heads": 8},
    "deepseek_v2": {**COMMON, **MIXTURE, **LATENT, "q_lora_rank": None},
    "deepseek_v3": {**COMMON, **MIXTURE, **LATENT, **GROUPS, "q_lora_rank": 256, "num_nextn_predict_layers": 0},
    "deepseek_v32": {
        **COMMON,
        **MIXTURE,
        **LATENT,
        **GROUPS,
        "q_lora_rank": 256,
        "num_nextn_predict_layers": 0,
        "index_n_heads": 16,
        "index_head_dim": 64,
        "index_topk": 256,
    },
    "llama": {**COMMON, "num_key_value_heads": 8},
    "qwen2": {**COMMON, "num_key_value_heads": 2},
}
"""`model_type` → configuration, in proportions like the published ones."""
DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Measure and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="alternations per shape")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--dtypes", nargs="*", default=DTYPES, choices=DTYPES)
    parser.add_argument("--compile", action="store_true", help="also torch.compile transformers' fastest setting")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
    else:
        print(json.dumps(compare(args), indent=2))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Every family in every dtype, each in a process of its own."""
    from nautile.core.machine import describe, measure_gemm_peak

    rows: dict[str, Any] = {}
    for family in args.families:
        for dtype in args.dtypes:
            rows[f"{family} {dtype}"] = row = worker(family, dtype, args)
            print(f"{family} {dtype}: {row.get('ratio', row)}", file=sys.stderr)
    ratios = {name: row["ratio"] for name, row in rows.items() if "ratio" in row}
    for name, row in rows.items():
        ratios |= {f"{name} prefill {shape}": found["ratio"] for shape, found in row.get("prefill", {}).items()}
    return {
        "benchmark": "forward_cpu",
        "commit": commit(),
        "machine": describe(),
        "threads": args.threads,
        "rounds": args.rounds,
        "gemm_peak_gflops": {dtype: round(measure_gemm_peak(dtype), 1) for dtype in args.dtypes},
        "configs": {family: FAMILIES[family] for family in args.families},
        "rows": rows,
        "ratio": ratios,
        "lowest_ratio": min(ratios.values(), default=None),
    }


def worker(family: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the process of one family reports."""
    command = [sys.executable, __file__, "--worker", family, "--dtypes", dtype]
    command += ["--threads", str(args.threads), "--rounds", str(args.rounds), *(["--compile"] if args.compile else [])]
    # Threads spin briefly at barriers and then sleep, as the command line lets them: docs/log.md.
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "GOMP_SPINCOUNT": "10000"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{family} {dtype} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def commit() -> str:
    """The commit that this file belongs to, with a mark if the tree has changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


# --- one family -----------------------------------------------------------------------------------------------------

Forward = Callable[[Any], Any]
"""Token ids [B, S] to logits."""


class Engine(NamedTuple):
    """What is timed of one engine."""

    forward: Forward
    """Logits of all positions."""
    prefill: Forward
    """Logits after the last position, and everything in a new cache."""


def measure(family: str, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of both engines for each shape."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtypes[0])
    with tempfile.TemporaryDirectory() as folder:
        write_model(family, Path(folder))
        exact, ours = load_ours(folder, torch.float32), load_ours(folder, dtype)
        rivals = load_theirs(family, folder, dtype)
    tokens = Tokens()
    prefill = {}
    with torch.inference_mode():
        off = check_logits({"exact": exact, "nautile": ours, **rivals}, tokens(1, 256), dtype)
        del exact
        forwards = {name: rival.forward for name, rival in rivals.items()}
        shapes = {f"{B}x{S}": meet(ours.forward, forwards, B, S, tokens, args) for B, S in SHAPES}
        if length := PREFILLS.get(family):
            best = shapes["1x1024"]["best_rival"].removesuffix(" compile")
            found = meet(ours.prefill, {best: rivals[best].prefill}, 1, length, tokens, args)
            prefill = {"prefill": {f"1x{length}": found}}
    return {
        "logits_off_float32": off,
        "shapes": shapes,
        **prefill,
        "ratio": round(statistics.geometric_mean(row["ratio"] for row in shapes.values()), 3),
    }


class Tokens:
    """Fresh random ids with every call, the same ones in every run."""

    def __init__(self) -> None:
        import torch

        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, B: int, S: int) -> Any:
        import torch

        return torch.randint(0, COMMON["vocab_size"], (B, S), generator=self.generator)


def meet(
    ours: Forward, rivals: dict[str, Forward], B: int, S: int, tokens: Tokens, args: argparse.Namespace
) -> dict[str, Any]:
    """Two forwards each choose transformers' two fastest settings; then those and ours run in turn."""
    trial = {name: [seconds(forward, tokens(B, S)) for _ in range(2)] for name, forward in rivals.items()}
    finalists = sorted(trial, key=lambda name: min(trial[name]))[:2]
    engines = {"nautile": ours, **{name: rivals[name] for name in finalists}}
    if args.compile:
        import torch

        compiled = torch.compile(rivals[finalists[0]])
        engines[f"{finalists[0]} compile"] = lambda ids: compiled(ids)
    for forward in engines.values():
        forward(tokens(B, S))
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(args.rounds):
        ids = tokens(B, S)
        for name, forward in engines.items():
            # The settings of transformers share their weights: whoever follows another finds them in the cache.
            forward(tokens(B, S))
            times[name].append(seconds(forward, ids))
    rival = min((name for name in engines if name != "nautile"), key=lambda name: statistics.median(times[name]))
    ratios = [theirs / mine for theirs, mine in zip(times[rival], times["nautile"], strict=True)]
    return {
        "tokens_per_second": {name: round(B * S / statistics.median(values)) for name, values in times.items()},
        "trial_tokens_per_second": {name: round(B * S / min(values)) for name, values in trial.items()},
        "best_rival": rival,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_of_rounds": [round(ratio, 3) for ratio in ratios],
    }


def seconds(forward: Forward, ids: Any) -> float:
    """Wall time of one forward."""
    start = time.perf_counter()
    forward(ids)
    return time.perf_counter() - start


def check_logits(engines: dict[str, Engine], ids: Any, dtype: Any) -> dict[str, float]:
    """How far each engine's logits are from ours in float32, as norm of the difference over norm.

    In float32 no more than rounding. In bfloat16 a rounding turns a router's close decision now and then, in either
    engine; ours must not be further off than theirs.
    """
    import torch

    logits = {name: engine.forward(ids).double() for name, engine in engines.items()}
    exact = logits.pop("exact")
    off = {name: float(f"{(values - exact).norm() / exact.norm():.1e}") for name, values in logits.items()}
    mine, theirs = off["nautile"], [value for name, value in off.items() if name != "nautile"]
    if not (max(theirs) < 1e-3 if dtype == torch.float32 else mine <= 1.2 * min(theirs)):
        raise SystemExit(f"logits are off by {off}")
    return off


def write_model(family: str, folder: Path) -> None:
    """Random weights in the published layout."""
    import torch

    import nautile
    from nautile.models import FAMILIES as PACKAGES

    package, stem = PACKAGES[family]
    config = getattr(import_module(f"{package}.config"), f"{stem}Config")(**FAMILIES[family])
    model = getattr(import_module(f"{package}.model"), f"{stem}ForCausalLM")(config)
    model.init_weights(torch.Generator().manual_seed(0))
    nautile.save(model, folder)


def load_ours(folder: str, dtype: Any) -> Engine:
    """Ours, with logits in the dtype of the weights, as transformers returns them; `model(tokens)` is float32."""
    import nautile
    from nautile.core.context import ForwardContext
    from nautile.infer.batch import Batch
    from nautile.infer.params import SamplingParams

    model = nautile.load(folder, dtype=dtype)
    return Engine(
        lambda ids: model.lm_head(model.hidden(ForwardContext.for_tokens(ids)).hidden_BSD),
        lambda ids: Batch(model, ids.tolist(), [SamplingParams(temperature=0.0)] * len(ids)).step(),
    )


def load_theirs(family: str, folder: str, dtype: Any) -> dict[str, Engine]:
    """transformers, once for every setting; the settings share their weights."""
    import torch
    from transformers import AutoModelForCausalLM

    if family == "deepseek":
        model, switch = llama_with_mixture(Path(folder), dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        switch = model.config
    mixture = "n_routed_experts" in FAMILIES[family]

    def setting(attention: str, experts: str | None) -> Engine:
        def forward(ids: Any, **how: Any) -> Any:
            model.set_attn_implementation(attention)
            if experts:
                switch._experts_implementation = experts
            return model(input_ids=ids, **how).logits

        return Engine(
            lambda ids: forward(ids, use_cache=False), lambda ids: forward(ids, use_cache=True, logits_to_keep=1)
        )

    names = [(attention, experts) for attention in ("sdpa", "eager") for experts in ("eager", "grouped_mm")]
    if not mixture:
        names = [("sdpa", None), ("eager", None)]
    engines = {f"transformers {a} attention" + (f", {e} experts" if e else ""): setting(a, e) for a, e in names}
    return {name: engine for name, engine in engines.items() if runs(engine.forward, torch.zeros(1, 4).long(), name)}


def runs(forward: Forward, ids: Any, name: str) -> bool:
    """Whether this model of transformers has the setting; those that do not say so."""
    try:
        forward(ids)
    except (ValueError, NotImplementedError) as error:
        print(f"{name}: not available ({str(error).splitlines()[0]})", file=sys.stderr)
        return False
    return True


def llama_with_mixture(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """DeepSeekMoE of transformers' parts, Llama with DeepSeek-V2's mixture; and the configuration of the latter."""
    import torch
    from safetensors.torch import load_file
    from transformers import DeepseekV2Config, LlamaConfig, LlamaForCausalLM
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    c = FAMILIES["deepseek"]
    shared = {key: c[key] for key in (*COMMON, "num_key_value_heads")}
    model = LlamaForCausalLM(LlamaConfig(**shared))
    weights = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    E = c["n_routed_experts"]
    config = DeepseekV2Config(**shared, **MIXTURE, topk_method="greedy", routed_scaling_factor=1.0, n_group=1)
    for layer in range(c["first_k_dense_replace"], c["num_hidden_layers"]):
        model.model.layers[layer].mlp = DeepseekV2Moe(config)
        at = f"model.layers.{layer}.mlp.experts"
        take = [{p: weights.pop(f"{at}.{e}.{p}_proj.weight") for p in ("gate", "up", "down")} for e in range(E)]
        weights[f"{at}.gate_up_proj"] = torch.stack([torch.cat([t["gate"], t["up"]]) for t in take])
        weights[f"{at}.down_proj"] = torch.stack([t["down"] for t in take])
    model.load_state_dict(weights)
    return model.to(dtype).eval(), config


if __name__ == "__main__":
    main()
