"""The weights of DeepSeek's inference demo: its names, and how it cuts them for N processes.

A weight keeps its name except for the table `NAMES`; process i of N gets the i-th part of its rows or columns, or the
whole, and the experts ``i·E/N : (i+1)·E/N`` uncut. FP8 weights and their scales stay as stored, unless another dtype
is asked for. MTP modules have no place there.

Source: ``inference/convert.py`` of DeepSeek-V3 and of DeepSeek-V3.2-Exp.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nautile.checkpoint.convert.job import Cast, Job, Output, Part, quantising
from nautile.checkpoint.fp8 import SCALE
from nautile.checkpoint.source import Checkpoint
from nautile.core.errors import UserError

NAMES: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "wq_b": ("wq_b", None),  # this and the next three: the indexer of V3.2, whole in every process
    "wk": ("wk", None),
    "k_norm": ("k_norm", None),
    "weights_proj": ("weights_proj", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
}
"""Published module → the demo's name, and the dimension that is cut for several processes."""
MTP = "multi-token-prediction modules have no place in the demo"
FREQUENCIES = "the demo computes the rotary frequencies itself"
MODULES = {"self_attn": "attn", "mlp": "ffn"}
LEAVES = {
    "weight": "weight",
    "weight_scale_inv": "scale",
    "bias": "bias",
    "e_score_correction_bias": "bias",
}


@dataclass(frozen=True)
class Target:
    """Where a published tensor goes."""

    name: str
    dim: int | None
    """Dimension that is cut."""
    expert: int | None
    """Number of the routed expert that it belongs to: only one process has it, uncut."""


def target(published: str, layers: int) -> Target | None:
    """Place of a tensor in the demo; None for tensors of MTP modules and for stored frequencies.

    Args:
        published: Name in the published folder.
        layers: ``num_hidden_layers``; what lies behind are MTP modules.

    Raises:
        UserError: The demo knows no such tensor.
    """
    words = published.removeprefix("model.").split(".")
    numbers = [word for before, word in zip(words, words[1:], strict=False) if before in ("layers", "experts")]
    if words == ["layers"] or not all(number.isascii() and number.isdecimal() for number in numbers):
        raise _no_place(published)
    if words[-1] == "inv_freq" or (words[0] == "layers" and int(numbers[0]) >= layers):
        return None
    routed = "experts" in words
    if len(words) < 2 or words[-2] not in NAMES or not _leaf_fits(words[-2], words[-1]):
        raise _no_place(published)
    if routed and (len(words) < 4 or words[-4] != "experts"):
        raise _no_place(published)
    module, dim = NAMES[words[-2]]
    expert = int(words[-3]) if routed else None
    inside = [MODULES.get(word, word) for word in words[:-2]]
    return Target(".".join([*inside, module, LEAVES[words[-1]]]), None if expert is not None else dim, expert)


def _no_place(published: str) -> UserError:
    return UserError(
        f"{published} has no place in DeepSeek's demo",
        "it runs the families deepseek_v2, deepseek_v3 and deepseek_v32, and no parts added to them",
        "convert the published checkpoint of one of these",
    )


def _leaf_fits(module: str, leaf: str) -> bool:
    if leaf == "bias":
        return module == "k_norm"
    return leaf in LEAVES and (leaf != "e_score_correction_bias" or module == "gate")


def cut(
    whole: list[Job], checkpoint: Checkpoint, ranks: int, config: Mapping[str, Any]
) -> tuple[list[list[Job]], Counter[str]]:
    """The jobs of each process, and how many tensors are left out, by reason.

    Args:
        whole: What would be done to the folder if it were not cut.
        checkpoint: The folder.
        ranks: Processes to cut for.
        config: Its config.json.

    Raises:
        UserError: The model cannot be cut so, or has parts that the demo does not know.
    """
    targets = [(job, target(job.source, config["num_hidden_layers"])) for job in whole]
    kept = [(job, place) for job, place in targets if place is not None]
    for job, place in kept:
        _check_place(job, place, config)
    _check_cut([(job, place.dim, _block(job, checkpoint)) for job, place in kept], config, ranks)
    per_rank = (config["n_routed_experts"] or ranks) // ranks
    cut_jobs = [
        [
            _cut_job(job, place, rank, ranks)
            for job, place in kept
            if place.expert is None or place.expert // per_rank == rank
        ]
        for rank in range(ranks)
    ]
    left_out = Counter(FREQUENCIES if job.source.endswith("inv_freq") else MTP for job, place in targets if not place)
    return cut_jobs, left_out


def _check_place(job: Job, place: Target, config: Mapping[str, Any]) -> None:
    experts = config["n_routed_experts"]
    if place.expert is not None and place.expert >= experts:
        problem = f"is of expert {place.expert}, config.json has {experts}"
    elif place.dim is not None and len(job.weight.shape) != 2:
        problem = f"is {list(job.weight.shape)}, not a matrix"
    else:
        return
    raise UserError(
        f"--to deepseek-demo: {job.source} {problem}",
        "the demo could not place it",
        "check that config.json and the weights belong together",
    )


def _cut_job(job: Job, place: Target, rank: int, ranks: int) -> Job:
    part, shape = _part(job.weight.shape, place.dim, rank, ranks)
    weight = Output(place.name, job.weight.dtype, shape)
    if job.format is not None:
        return quantising(job.source, weight, place.name.removesuffix("weight") + "scale", job.format, part)
    return replace(job, weight=weight, part=part)


def _block(job: Job, checkpoint: Checkpoint) -> tuple[int, int]:
    """Rows and columns that share a scale in the files to be written."""
    if job.format is not None:
        return job.format.block
    if job.cast is Cast.KEEP and job.source + SCALE in checkpoint.infos and checkpoint.quantization:
        return checkpoint.quantization.block
    return (1, 1)


def _part(shape: tuple[int, ...], dim: int | None, rank: int, ranks: int) -> tuple[Part | None, tuple[int, ...]]:
    if dim is None or ranks == 1:
        return None, shape
    size = shape[dim] // ranks
    return Part(dim, rank * size, (rank + 1) * size), (*shape[:dim], size, *shape[dim + 1 :])


def _check_cut(cuts: list[tuple[Job, int | None, tuple[int, int]]], config: Mapping[str, Any], ranks: int) -> None:
    """Refuse a number of processes that does not divide the model, and name those that do.

    Args:
        cuts: Job, dimension that is cut, and block of the scales, of each tensor.
        config: The model's config.json.
        ranks: Processes asked for.
    """
    counts = {
        "attention heads": config["num_attention_heads"],
        "experts": config["n_routed_experts"],
        "tokens of the vocabulary": config["vocab_size"],
    }
    sides = {
        (job.source, job.weight.shape[dim], block[dim])
        for job, dim, block in cuts
        if dim is not None and not job.source.endswith(SCALE)
    }

    def problems(n: int) -> Iterator[str]:
        for what, count in counts.items():
            if count % n:
                yield f"{count} {what} cannot be shared by {n}"
        for name, side, block in sorted(sides):
            if side % n:
                yield f"{name} has a side of {side}, which {n} does not divide"
            elif n > 1 and side // n % block:
                yield f"{name} would be cut into parts of {side // n}, across FP8 blocks of {block}"

    problem = next(problems(ranks), None)
    if problem is None:
        return
    common = math.gcd(*counts.values())
    good = [str(n) for n in range(1, common + 1) if common % n == 0 and next(problems(n), None) is None]
    raise UserError(
        f"--model-parallel {ranks}: {problem}",
        "every process of the demo holds an equal part",
        f"--model-parallel {' or '.join(good)}",
    )
