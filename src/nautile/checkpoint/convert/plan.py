"""All that a conversion will write, known from headers alone: files of weights, texts, and what is copied."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nautile.checkpoint.convert import demo, demo_config, dtypes
from nautile.checkpoint.convert.files import CONFIG, TOKENIZER, Beside, beside, converted_config, read_config
from nautile.checkpoint.convert.job import Job, Output
from nautile.checkpoint.convert.options import Options
from nautile.checkpoint.fp8 import SCALE
from nautile.checkpoint.header import encode, lay_out
from nautile.checkpoint.index import SAFETENSORS
from nautile.checkpoint.source import Checkpoint
from nautile.core.errors import UserError


@dataclass(frozen=True)
class Shard:
    """One file of weights to be written, and the jobs that fill it."""

    file: str
    jobs: tuple[Job, ...]

    def outputs(self) -> Iterator[Output]:
        """Every tensor of the file."""
        for job in self.jobs:
            yield from job.outputs

    @property
    def tensor_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(output.nbytes for output in self.outputs())

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        infos = lay_out({output.name: (output.dtype, output.shape) for output in self.outputs()})
        return len(encode(infos, {"format": "pt"})) + self.tensor_bytes


@dataclass
class Plan:
    """A conversion, before anything is written."""

    shards: list[Shard]
    texts: dict[str, str]
    """Name → contents of the JSON files that are made."""
    beside: Beside
    notes: list[str] = field(default_factory=list)
    """What the reader should know of the result."""

    def digest(self) -> str:
        """Changes when anything but a copied file would be written differently."""
        state = hashlib.sha256()
        for shard in self.shards:
            state.update(repr(shard).encode())
        state.update(json.dumps(self.texts, sort_keys=True).encode())
        return state.hexdigest()


def make_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Plan the conversion of an open folder.

    Raises:
        UserError: It cannot be done; nothing has been written.
    """
    if not checkpoint.infos:
        raise UserError(
            f"{checkpoint.folder}: no tensors",
            "its files of weights hold none",
            "copy or download them again, or name another folder",
        )
    config = read_config(checkpoint.folder)
    if options.to == "deepseek-demo":
        return _demo_plan(checkpoint, options, config)
    assert options.dtype
    fmt = dtypes.fp8_format(options)
    if fmt and not config:
        raise UserError(
            f"{checkpoint.folder}: no {CONFIG}",
            "it is where readers look for the block size of FP8 weights",
            f"copy or download {CONFIG} into the folder",
        )
    jobs = dtypes.jobs(checkpoint, options, config)
    by_file: dict[str, list[Job]] = {}
    for job in jobs:
        by_file.setdefault(_safetensors_name(checkpoint.files[job.source].name), []).append(job)
    shards = [Shard(file, tuple(made)) for file, made in by_file.items()]
    texts = {}
    if config:
        texts[CONFIG] = _json(converted_config(config, str(dtypes.TORCH[options.dtype]).removeprefix("torch."), fmt))
    if len(shards) > 1 or shards[0].file != SAFETENSORS.single:
        texts[SAFETENSORS.index] = _json(
            {
                "metadata": {"total_size": sum(shard.tensor_bytes for shard in shards)},
                "weight_map": {output.name: shard.file for shard in shards for output in shard.outputs()},
            }
        )
    return Plan(shards, texts, beside(checkpoint.folder, _used(checkpoint)), _dtype_notes(checkpoint, jobs))


def _demo_plan(checkpoint: Checkpoint, options: Options, config: dict[str, Any]) -> Plan:
    whole = dtypes.jobs(checkpoint, options, config)
    quantised = [name for name in checkpoint.weight_names() if name + SCALE in checkpoint.infos]
    fmt = dtypes.fp8_format(options)
    if options.dtype is None and quantised:
        fmt = checkpoint.quantization
    args = demo_config.model_args(config, fmt is not None, fmt.scale_fmt if fmt else None)
    ranks, left_out = demo.cut(whole, checkpoint, options.model_parallel, config)
    if not any(job.weight.name == "head.weight" for job in ranks[0]):
        raise UserError(f"{checkpoint.folder}: no lm_head.weight", "the demo reads one", "check the folder's weights")
    n = options.model_parallel
    shards = [Shard(f"model{rank}-mp{n}.safetensors", tuple(jobs)) for rank, jobs in enumerate(ranks)]
    notes = [f"{demo_config.FILE} is what the demo's generate.py takes as --config"]
    for reason, count in left_out.items():
        notes.append(f"{count} {'tensor is' if count == 1 else 'tensors are'} left out: {reason}")
    if demo_config.needs_bias_patch(config):
        notes.append(
            f"the demo reads the routing bias (gate.bias) only at hidden size {demo_config.BIASED_WIDTH}; "
            f"this model has {config['hidden_size']} and would need a change in its class Gate"
        )
    found = beside(checkpoint.folder, _used(checkpoint), TOKENIZER)
    return Plan(shards, {demo_config.FILE: _json(args)}, found, notes)


def _dtype_notes(checkpoint: Checkpoint, jobs: list[Job]) -> list[str]:
    dequantised = sum(job.source + SCALE in checkpoint.infos for job in jobs)
    quantised = sum(job.scale is not None for job in jobs)
    rounded = sum(job.weight.dtype != checkpoint.infos[job.source].dtype for job in jobs) - dequantised - quantised
    kept = len(jobs) - dequantised - quantised - rounded
    counts = (("dequantised", dequantised), ("quantised", quantised), ("of another dtype now", rounded))
    parts = [f"{count} {what}" for what, count in counts if count]
    return [f"weights: {', '.join([*parts, f'{kept} as they were'])}"]


def _used(checkpoint: Checkpoint) -> set[str]:
    return {path.name for path in checkpoint.files.values()}


def _safetensors_name(file: str) -> str:
    """Name of the file that takes the place of `file`; pickled ones are called ``pytorch_model….bin``."""
    if not file.endswith(".bin"):
        return file
    return file.removesuffix(".bin").replace("pytorch_model", "model") + ".safetensors"


def _json(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
