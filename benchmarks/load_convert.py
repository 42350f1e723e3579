"""Loading a sharded checkpoint: nautile beside transformers and beside reading the same files.

    python benchmarks/load_convert.py --gigabytes 2 > benchmarks/results/load_convert.json

A synthetic DeepSeek-V3-like checkpoint in bfloat16, and its FP8 twin, are written to a temporary folder. Every
measurement is a process of its own; contenders take turns, so that a disturbed machine disturbs all alike, and figures
are medians over the rounds. `cold`: the files were dropped from the page cache before each measurement (the disk of a
virtual machine may still be cached by its host); `warm`: they are all in it. Each loader's time includes reading
every byte of every weight once afterwards, because a memory map has read nothing when it returns; the XOR of all bytes
must be the same for both. Contenders:

    read           sequential read of the files through one buffer of 8 MiB
    read and keep  the same into fresh memory, as any loader must that keeps the weights
    nautile        nautile.load(folder, torch.bfloat16)
    transformers   AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    nautile fp8    nautile.load of the FP8 twin in bfloat16, which transformers cannot load on a CPU

Conversions are measured by convert_section.py, on the same two checkpoints. One JSON document on stdout.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert_section import convert_section
from convert_section import work as work_on_conversion

CONTENDERS = ("read", "read and keep", "nautile", "transformers", "nautile fp8")
BUFFER = 8 << 20
CONFIG = {
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 704,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 384,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 4096,
}
"""Experts of 1.4 MB per tensor, four times smaller than V2-Lite's: many small tensors are the harder case."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of the bfloat16 checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=CONTENDERS, help=f"contenders, of: {', '.join(CONTENDERS)}")
    parser.add_argument("--sections", nargs="*", default=("load", "convert"), choices=("load", "convert"))
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; default: a temporary folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        sizes = {kind: worker(f"write {kind}", Path(name) / kind, args) for kind in ("bf16", "fp8")}
        loading = load_section(Path(name), args) if "load" in args.sections else None
        converting = None
        if "convert" in args.sections:
            converting = convert_section(Path(name), args.rounds, lambda what, path: worker(what, path, args))
    from nautile.core.machine import describe  # imports torch: not before the last process has started

    document = {
        "benchmark": "load_convert",
        "commit": commit(),
        "machine": describe(),
        "threads": args.threads,
        "config": CONFIG,
        "checkpoints": sizes,
        "load": loading,
        "convert": converting,
    }
    print(json.dumps(document, indent=2))


def commit() -> str:
    """The commit that this file belongs to, with a mark if the tree has changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def worker(name: str, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a new process says of one piece of work.

    This process stays small until the end: Linux counts the memory of the process that starts another one as a peak
    of that one.
    """
    command = [sys.executable, __file__, "--worker", name, "--model", str(model), "--threads", str(args.threads)]
    command += ["--gigabytes", str(args.gigabytes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with code {done.returncode}")
    return json.loads(done.stdout)


# --- loading ------------------------------------------------------------------------------------------------------


def load_section(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders, cold and warm."""
    rows: dict[str, Any] = {}
    for cache in ("cold", "warm"):
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
        for _ in range(args.rounds):
            for name in args.only:
                model = folder / ("fp8" if name.endswith("fp8") else "bf16")
                prepare_cache(model, cache)
                results[name].append(worker(name, model, args))
        check_same(results)
        rows[cache] = {name: summary(found) for name, found in results.items()}
        rows[cache]["ratios"] = ratios(results)
        for name in args.only:
            print(f"{cache} {name}: {rows[cache][name]}", file=sys.stderr)
    return rows


def prepare_cache(model: Path, cache: str) -> None:
    """Drop the folder's files from the page cache, or bring them into it."""
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            if cache == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(BUFFER):
                    pass


def check_same(results: dict[str, list[dict[str, Any]]]) -> None:
    """Refuse to compare loaders that do not hold the same weights."""
    found = {row["xor"] for name in ("nautile", "transformers") for row in results.get(name, [])}
    if len(found) > 1:
        raise SystemExit(f"the loaders hold different weights: {found}")


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one contender."""
    seconds = statistics.median(row["seconds"] for row in found)
    row = {
        "seconds": round(seconds, 3),
        "gigabytes_per_second": round(found[0]["bytes"] / seconds / 1e9, 3),
        "seconds_of_rounds": [round(row["seconds"], 3) for row in found],
    }
    if "peak_rss_mib" in found[0]:
        for key in ("peak_rss_mib", "peak_above_start_mib"):
            row[key] = round(statistics.median(row[key] for row in found))
    return row


def ratios(results: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Median over rounds of how much faster we are than the others, paired; and memory."""

    def speed(ours: str, theirs: str) -> float:
        pairs = zip(results[ours], results[theirs], strict=True)
        found = [(b["seconds"] / b["bytes"]) / (a["seconds"] / a["bytes"]) for a, b in pairs]
        return round(statistics.median(found), 3)

    rivals = [name for name in ("read", "read and keep", "transformers") if name in results]
    found = {f"{ours} / {name}": speed(ours, name) for ours in results if "nautile" in ours for name in rivals}
    if {"nautile", "transformers"} <= results.keys():
        both = ("nautile", "transformers")
        peaks = {name: statistics.median(row["peak_above_start_mib"] for row in results[name]) for name in both}
        found["memory: nautile / transformers"] = round(peaks["nautile"] / peaks["transformers"], 3)
    return found


# --- the working side ---------------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """Do what `--worker` names and print what came of it."""
    answers, sys.stdout = sys.stdout, sys.stderr  # engines print where they like
    name, model = args.worker, args.model
    if name.startswith("convert"):
        result = work_on_conversion(name, model)
    elif name.startswith("read"):
        result = read(model, keep=name.endswith("keep"))
    elif name.startswith("write"):
        result = write_checkpoint(model, args.gigabytes, fp8=name.endswith("fp8"))
    else:
        result = load(name, model, args.threads)
    print(json.dumps(result), file=answers)


def read(model: Path, keep: bool) -> dict[str, Any]:
    """Seconds to read all files one after the other."""
    start = time.perf_counter()
    total, kept, buffer = 0, [], bytearray(BUFFER)
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            if keep:
                import numpy as np

                kept.append(np.empty(path.stat().st_size, np.uint8))  # fresh memory, not zeroed first
                view, done = memoryview(kept[-1]), 0
                while got := file.readinto(view[done : done + BUFFER]):
                    done += got
                total += done
            else:
                while got := file.readinto(buffer):
                    total += got
    return {"seconds": time.perf_counter() - start, "bytes": total}


def load(name: str, model: Path, threads: int) -> dict[str, Any]:
    """Seconds to load the model and read all its weights once; peak memory; XOR of all bytes."""
    import torch

    torch.set_num_threads(threads)
    # Imports of the model's code come before the clock starts.
    read: Callable[..., Any]
    if name.startswith("nautile"):
        from nautile.models.deepseek_v3 import model as _
        from nautile.models.io import load_model as read
    else:
        from transformers import AutoModelForCausalLM, logging
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as _  # noqa: F401

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        read = AutoModelForCausalLM.from_pretrained
    before = peak_mib()
    start = time.perf_counter()
    loaded = read(model, dtype=torch.bfloat16)
    returned = time.perf_counter() - start
    xor = touch(loaded)
    seconds = time.perf_counter() - start
    peak = peak_mib()
    return {
        "seconds": seconds,
        "seconds_until_returned": returned,
        "bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "xor": xor,
        "peak_rss_mib": peak,
        "peak_above_start_mib": peak - before,
    }


def touch(model: Any) -> int:
    """XOR of all parameters' bytes, as 64-bit words."""
    import numpy as np
    import torch

    found = 0
    for parameter in model.parameters():
        words = parameter.detach().reshape(-1).view(torch.uint8).numpy().view(np.uint64)
        found ^= int(np.bitwise_xor.reduce(words))
    return found


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_checkpoint(folder: Path, gigabytes: float, fp8: bool) -> dict[str, Any]:
    """A checkpoint of about that size in bfloat16 (half of it in FP8) with random weights, in at least four shards.

    One tensor at a time: memory does not grow with the size.
    """
    import torch

    from nautile.checkpoint.allocate import meta_device
    from nautile.checkpoint.compare import targets
    from nautile.checkpoint.fp8 import Fp8Format, is_quantized, scale_shape
    from nautile.checkpoint.save import split_shards
    from nautile.checkpoint.shard import ShardWriter
    from nautile.models.family import build_model, layout_of

    config = config_of(gigabytes)
    with meta_device():
        model = build_model(config)
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in targets(model, layout_of(config)).items():
        shape = tuple(tensor.shape)
        if fp8 and is_quantized(name, shape):
            kinds[name] = (torch.float8_e4m3fn, shape)
            kinds[f"{name}_scale_inv"] = (torch.float32, scale_shape(shape))
        else:
            kinds[name] = (torch.float32 if name.endswith("bias") else torch.bfloat16, shape)
    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in kinds.items()}
    shards = split_shards(sizes, min(5 * 10**9, sum(sizes.values()) // 4))
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(max(torch.Size(shape).numel() for _, shape in kinds.values()) + 4096, generator=generator) * 0.02
    for file, names in zip(files, shards, strict=True):
        with ShardWriter(folder / file, {name: kinds[name] for name in names}) as writer:
            for i, name in enumerate(names):
                dtype, shape = kinds[name]
                values = pool[i % 4096 :][: torch.Size(shape).numel()].view(shape)
                scaled = values.abs() + 0.001 if name.endswith("_scale_inv") else values
                writer.write(name, (scaled * 100 if dtype == torch.float8_e4m3fn else scaled).to(dtype))
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {"quantization_config": Fp8Format().to_hf()} if fp8 else {}
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), "torch_dtype": "bfloat16", **quantization}))
    return {"bytes": sum(sizes.values()), "tensors": len(kinds), "files": len(files)}


def config_of(gigabytes: float) -> Any:
    """CONFIG with so many layers that its bfloat16 weights come near `gigabytes`."""
    from nautile.checkpoint.allocate import meta_device
    from nautile.models.deepseek_v3.config import DeepseekV3Config
    from nautile.models.family import build_model

    def size(layers: int) -> float:
        with meta_device():
            model = build_model(DeepseekV3Config(**CONFIG, num_hidden_layers=layers))
        return sum(parameter.numel() for parameter in model.parameters()) * 2 / 1e9

    per_layer = size(3) - size(2)
    return DeepseekV3Config(**CONFIG, num_hidden_layers=max(2, 2 + round((gigabytes - size(2)) / per_layer)))


if __name__ == "__main__":
    main()
