"""``nautile check``: does a model folder hold what its config.json promises? Told from headers, no tensor is read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from nautile.cli.check_report import print_report
from nautile.cli.flags import parse
from nautile.core.errors import UserError
from nautile.core.json_file import read_json_object

if TYPE_CHECKING:
    from nautile.checkpoint.compare import Comparison
    from nautile.checkpoint.source import Checkpoint
    from nautile.models.config import DecoderConfig

EXAMPLES = (
    "nautile check runs/demo",
    "nautile check path/to/DeepSeek-V3 --json",
    "nautile check deepseek-ai/DeepSeek-V3",
)

GENERATION = "generation_config.json"
"""File of sampling defaults beside a model."""


@dataclass(frozen=True)
class CheckArgs:
    """What to check."""

    model: tyro.conf.Positional[str]
    """A model folder, a run, or a Hub id: of that one, the headers are fetched and the weights stay where they are."""
    lines: int = 20
    """Most tensors to name in each list; 0 for all."""
    json: bool = False
    """Print one JSON object, every list whole, instead of text."""
    allow_pickle: bool = False
    """Also look into pickled .bin weights, with torch.load's weights_only. Those of a Hub id are downloaded for it."""


def main(argv: Sequence[str]) -> int:
    """Examine, print; 0 when the folder is whole, 2 when it is not."""
    description = (
        "Compare names, shapes and dtypes of a model's tensors with its config.json. Reads headers, no tensor. "
        "Exits with 0 when everything is there, with 2 and the lists when not."
    )
    args = parse(CheckArgs, None, argv, "nautile check", description, EXAMPLES)
    if args.lines < 0:
        raise UserError(f"--lines {args.lines} is not possible", "it counts the tensors to name", "--lines 0 for all")
    report = check(args.model, args.allow_pickle)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, args.lines or None)
    return 0 if report["whole"] else 2


def check(model: str, allow_pickle: bool = False) -> dict[str, Any]:
    """Everything that ``nautile check`` prints, as JSON values.

    Raises:
        UserError: There is no such model, its family or quantisation is not supported, or a file is damaged.
    """
    from nautile.checkpoint.hub import remote_name
    from nautile.checkpoint.hub_headers import open_remote
    from nautile.checkpoint.source import open_checkpoint
    from nautile.models.family import read_config
    from nautile.models.io import model_folder

    if remote := remote_name(model):
        folder, opened = open_remote(remote, allow_pickle)
    else:
        folder = model_folder(model)
        opened = open_checkpoint(folder, allow_pickle)
    with opened as checkpoint:
        return _examine(model, folder, read_config(folder), checkpoint)


def _examine(name: str, folder: Path, promised: "DecoderConfig", checkpoint: "Checkpoint") -> dict[str, Any]:

    from nautile.checkpoint.allocate import meta_device
    from nautile.checkpoint.compare import compare
    from nautile.models.family import build_model, layout_of
    from nautile.models.io import without_absent_mtp

    config = without_absent_mtp(promised, checkpoint)
    with meta_device():
        model = build_model(config)
    comparison = compare(model, checkpoint, layout_of(config))
    problems, notes = _beside_the_weights(folder, config, checkpoint)
    if config != promised:
        notes.append("config.json promises MTP modules that the weights do not hold; the model loads without them")
    return {
        "model": name,
        "folder": str(folder),
        "family": config.MODEL_TYPE,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "parameters": _parameters(config),
        "weights": _weights(checkpoint),
        "quantization": _quantization(checkpoint),
        "quantised_weights": sum(checkpoint.is_scale(name) for name in checkpoint.infos),
        **_lists(comparison),
        "problems": problems,
        "notes": notes,
        "generation_config": _generation_config(folder),
        "whole": comparison.fits and not problems,
    }


def _lists(comparison: "Comparison") -> dict[str, Any]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in comparison.dropped.items():
        by_reason.setdefault(reason, []).append(name)
    return {
        "missing": comparison.missing,
        "unexpected": comparison.unexpected,
        "wrong_shape": comparison.wrong_shape,
        "wrong_dtype": comparison.wrong_dtype,
        "not_read": by_reason,
    }


def _parameters(config: "DecoderConfig") -> dict[str, int]:
    from nautile.models.accounting.parameters import mtp_parameters, parameters, total
    from nautile.models.accounting.shape import shape_from_config

    shape = shape_from_config(config.to_hf())
    main = total(parameters(shape))
    return {"main_model": main.total, "active_per_token": main.active, "mtp_modules": mtp_parameters(shape).total}


def _weights(checkpoint: "Checkpoint") -> dict[str, Any]:
    dtypes: dict[str, dict[str, int]] = {}
    for info in checkpoint.infos.values():
        count = dtypes.setdefault(str(info.dtype).removeprefix("torch."), {"tensors": 0, "bytes": 0})
        count["tensors"] += 1
        count["bytes"] += info.nbytes
    return {
        "files": len(set(checkpoint.files.values())),
        "tensors": len(checkpoint.infos),
        "bytes": sum(info.nbytes for info in checkpoint.infos.values()),
        "dtypes": dtypes,
    }


def _quantization(checkpoint: "Checkpoint") -> dict[str, Any] | None:
    """What config.json says, in DeepSeek's spelling; None of plain weights."""
    return checkpoint.quantization.to_hf() if checkpoint.quantization else None


def _beside_the_weights(folder: Path, config: "DecoderConfig", checkpoint: "Checkpoint") -> tuple[list[str], list[str]]:
    """What is wrong with the files beside the weights, and what is worth knowing about them."""
    from nautile.checkpoint.index import SAFETENSORS

    index = folder / SAFETENSORS.index
    problems, notes = _tokenizer(folder, config)
    if (folder / GENERATION).is_file() and _generation_config(folder) is None:
        notes.append(f"{GENERATION} is not a JSON object, so its sampling defaults are lost")
    for role, ids in {"bos_token_id": (config.bos_token_id,), "eos_token_id": config.eos_token_ids}.items():
        problems += [
            f"{role} {i} of config.json is no row of the embedding, which has {config.vocab_size}"
            for i in ids
            if i is not None and not 0 <= i < config.vocab_size
        ]
    if checkpoint.quantization and not any(map(checkpoint.is_scale, checkpoint.infos)):
        notes.append("config.json has a quantization_config, but no tensor has block scales: the weights are plain")
    if index.is_file():
        metadata = read_json_object(index, "it tells which file holds which tensor").get("metadata")
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        held = sum(info.nbytes for info in checkpoint.infos.values())
        if stated is not None and stated != held:
            # V3 and R1 state 1,369,062,772,000, twice their number of elements: no defect of the tensors.
            notes.append(f"{index.name} states total_size {stated:,}, the tensors have {held:,} bytes")
    return problems, notes


def _tokenizer(folder: Path, config: "DecoderConfig") -> tuple[list[str], list[str]]:
    from nautile.text.tokenizer import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        return [], ["no tokenizer.json: text has to come as token ids"]
    try:
        tokenizer = Tokenizer.load(folder)
    except UserError as error:
        return [], [f"{error.what}: text has to come as token ids"]
    rows, ids = config.vocab_size, tokenizer.vocab_size
    problems = [f"tokenizer.json has ids up to {ids - 1}, the embedding has {rows} rows"] if ids > rows else []
    notes = [f"{rows - ids} of the embedding's {rows:,} rows belong to no token"] if ids < rows else []
    if config.eos_token_ids and tokenizer.eos_id not in config.eos_token_ids:
        stated = ", ".join(map(str, config.eos_token_ids))
        notes.append(f"config.json ends documents with {stated}, the tokenizer with {tokenizer.eos_id}")
    return problems, notes


def _generation_config(folder: Path) -> dict[str, Any] | None:
    """Contents of generation_config.json, if it is there and a JSON object."""
    if not (folder / GENERATION).is_file():
        return None
    try:
        return read_json_object(folder / GENERATION, "sampling defaults are read from it")
    except UserError:
        return None
