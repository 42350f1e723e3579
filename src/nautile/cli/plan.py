"""``nautile plan``: what a model costs in parameters, FLOPs, cache and memory, before anything is allocated."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import tyro

from nautile.cli.flags import parse
from nautile.cli.plan_source import DEEPSEEK_67B, Source, find_source
from nautile.cli.plan_tables import print_plan
from nautile.core.errors import UserError
from nautile.models.accounting.cache import CacheCost, cache_cost, grouped_cache_cost, index_key_bits, index_key_cost
from nautile.models.accounting.flops import decode_flops, mtp_train_flops, prefill_flops, train_flops
from nautile.models.accounting.memory import inference_memory, training_memory
from nautile.models.accounting.parameters import fp8_scales, mtp_parameters, parameters, published_fp8_numbers, total
from nautile.models.accounting.shape import LatentAttention, Shape
from nautile.models.presets import PRESETS

EXAMPLES = ("nautile plan v3-671b", "nautile plan path/to/config.json --sequence-length 32768 --batch-size 8 --json")


LARGE = 10**9
"""Parameters from which a comparison with published models says something."""


@dataclass(frozen=True)
class PlanArgs:
    """What to plan."""

    model: tyro.conf.Positional[str]
    """A preset, a recipe, a config.json, its folder, a run, or a Hub id such as deepseek-ai/DeepSeek-V3."""
    sequence_length: int | None = None
    """Tokens per sequence. Default: the recipe's, else the model's context up to 4096."""
    batch_size: int | None = None
    """Sequences on the rank at once. Default: the recipe's micro-batch, else 1."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of the matrix products in training; master weights are float32 in both."""
    ranks: int = 1
    """Show the optimiser's memory as if divided over so many ranks. A plan: nautile trains on one rank today."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: Sequence[str]) -> int:
    """Read the shape, count, print."""
    description = (
        f"Parameters, FLOPs, cache and memory of a model. Nothing is allocated.\n\npresets: {', '.join(PRESETS)}"
    )
    args = parse(PlanArgs, None, argv, "nautile plan", description, EXAMPLES)
    report = plan(find_source(args.model), args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_plan(report)
    return 0


def plan(source: Source, args: PlanArgs) -> dict:
    """Everything that ``nautile plan`` prints, as JSON values. Bytes and FLOPs are plain numbers."""
    shape = source.shape
    length = _first_given(args.sequence_length, source.sequence_length, min(shape.context, 4096))
    batch = _first_given(args.batch_size, source.batch_size, 1)
    for name, value in [("sequence-length", length), ("batch-size", batch), ("ranks", args.ranks)]:
        if value < 1:
            raise UserError(f"--{name} {value} is not possible", "it counts something", f"--{name} 1 or more")
    return {
        "model": shape.name,
        "from": source.origin,
        "sequence_length": length,
        "batch_size": batch,
        "context": shape.context,
        "parameters": _parameters(shape),
        "flops_per_token": _flops(shape, length),
        "kv_cache_per_token": _caches(shape),
        "training_memory": _training(shape, batch, length, args.precision == "bf16", args.ranks),
        "inference_memory": _inference(shape, batch, length),
    }


def _first_given(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _parameters(shape: Shape) -> dict:
    parts, mtp = parameters(shape), mtp_parameters(shape)
    main = total(parts)
    report = {
        "parts": [asdict(part) for part in parts],
        "main_model": {"total": main.total, "active": main.active},
        "mtp_modules": {"total": mtp.total, "active": mtp.active},
        "with_mtp": main.total + mtp.total,
    }
    if shape.mtp_modules and main.total >= LARGE:  # V3's generation is published with MTP modules and in FP8
        report["published_fp8_checkpoint"] = {"numbers": published_fp8_numbers(shape), "scales": fp8_scales(shape)}
    return report


def _flops(shape: Shape, length: int) -> dict:
    rows = {
        "prefill": prefill_flops(shape, length),
        "decode": decode_flops(shape, length),
        "training": train_flops(shape, length),
    }
    if shape.mtp_modules:
        rows["training_mtp"] = mtp_train_flops(shape, length)
    return {
        name: {"weights": cost.weights, "attention": cost.attention, "all": cost.all} for name, cost in rows.items()
    }


def _caches(shape: Shape) -> list[dict]:
    """The model's own cache beside what other attentions would need, and beside the model that V2 replaced."""
    own, mha = cache_cost(shape), grouped_cache_cost(shape)
    rows: list[tuple[str, CacheCost, float]] = [(own.name, own, 16)]
    if keys := index_key_cost(shape):
        rows.append((keys.name, keys, 16))
        rows.append((f"{keys.name}, FP8 as in V3.2-Exp", keys, index_key_bits(shape)))
    elif isinstance(shape.attention, LatentAttention):
        rows.append((f"{own.name}, 6 bits (V2 paper §3.2.3)", own, 6))
    if shape.heads > 8 and own.elements != grouped_cache_cost(shape, 8).elements:
        rows.append(("as GQA, 8 groups", grouped_cache_cost(shape, 8), 16))
    if own != mha:
        rows.append(("as MHA", mha, 16))
    large = total(parameters(shape)).total >= LARGE and replace(shape, name=DEEPSEEK_67B.name) != DEEPSEEK_67B
    if large:
        rows.append((DEEPSEEK_67B.name, cache_cost(DEEPSEEK_67B), 16))
    return [_cache_row(name, cost, bits, mha, large) for name, cost, bits in rows]


def _cache_row(name: str, cost: CacheCost, bits: float, mha: CacheCost, large: bool) -> dict:
    size = cost.bytes(bits)
    row = {
        "name": name,
        "elements": cost.elements,
        "bits": bits,
        "bytes": size,
        "saved_against_mha": 1 - size / mha.bytes(),
    }
    return row | ({"saved_against_deepseek_67b": 1 - size / cache_cost(DEEPSEEK_67B).bytes()} if large else {})


def _training(shape: Shape, batch: int, length: int, bf16: bool, ranks: int) -> dict:
    today = training_memory(shape, batch, length, bf16=bf16)
    report = {"precision": "bf16" if bf16 else "fp32", "one_rank": {**asdict(today), "total": today.total}}
    if ranks > 1:
        divided = training_memory(shape, batch, length, bf16=bf16, moment_shards=ranks)
        report["planned_zero1"] = {"ranks": ranks, **asdict(divided), "total": divided.total}
    return report


def _inference(shape: Shape, batch: int, length: int) -> dict:
    memory = inference_memory(shape, batch, length)
    return {**asdict(memory), "total": memory.total}
