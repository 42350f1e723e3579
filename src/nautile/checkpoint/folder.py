"""Safetensors folders as Hugging Face publishes them: one file, or shards with an index."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nautile.checkpoint.layout import Layout
from nautile.core.errors import NautileError, UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def locate(folder: Path) -> dict[str, Path]:
    """Tensor name → file that holds it.

    Raises:
        UserError: No weights there, a shard is missing, or a file is not safetensors.
    """
    if (folder / INDEX).exists():
        files = json.loads((folder / INDEX).read_text())["weight_map"]
        missing = sorted({file for file in files.values() if not (folder / file).exists()})
        if missing:
            raise UserError(
                f"{folder}: {', '.join(missing)} is missing",
                f"{INDEX} says that tensors are stored there",
                "copy or download the missing files into the folder",
            )
        return {name: folder / file for name, file in files.items()}
    if not (folder / SINGLE).exists():
        raise UserError(
            f"{folder}: no {SINGLE} and no {INDEX}",
            "weights are read from safetensors only",
            "name a folder with config.json and safetensors, such as runs/demo/model",
        )
    with open_shard(folder / SINGLE) as shard:
        return dict.fromkeys(shard.keys(), folder / SINGLE)


def open_shard(path: Path):
    """A safetensors handle, or a `UserError` that says the file is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error})",
            "it was cut short or is of another format",
            "copy or download the file again",
        ) from error


@torch.no_grad()
def load_into(model: nn.Module, folder: Path, layout: Layout) -> None:
    """Fill every parameter and buffer of `model` from the folder, tensor by tensor, converting dtypes.

    Raises:
        UserError: Tensors are missing, not expected, or of another shape; nothing has been copied then.
    """
    files = locate(folder)
    targets = _targets(model, layout)
    ignored = set(layout.copies) | {name for name in files if name.endswith("rotary_emb.inv_freq")}
    tied = _tied_names(model)
    missing = sorted(name for name in targets if name not in files)
    unexpected = sorted(name for name in files if name not in targets and name not in ignored | tied)
    by_file: dict[Path, list[str]] = {}
    for name in targets:
        if name in files:
            by_file.setdefault(files[name], []).append(name)
    wrong = []
    for path, names in by_file.items():
        with open_shard(path) as shard:
            for name in names:
                shape = shard.get_slice(name).get_shape()
                if shape != list(targets[name].shape):
                    wrong.append(f"{name} is {shape}, not {list(targets[name].shape)}")
    problems = [
        *_listed("missing", missing),
        *_listed("unexpected", unexpected),
        *_listed("wrong shape", sorted(wrong)),
    ]
    if problems:
        raise UserError(
            f"{folder}: the weights do not fit config.json\n" + "\n".join(problems),
            "every tensor of the model must be there, in its shape, and nothing else",
            "check that config.json and the weights belong together",
        )
    for path, names in by_file.items():
        with open_shard(path) as shard:
            for name in names:
                targets[name].copy_(shard.get_tensor(name))


@torch.no_grad()
def save_from(model: nn.Module, folder: Path, layout: Layout, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write every parameter and buffer of `model` under its published name, in shards of at most `max_shard_bytes`.

    An earlier model in the folder is replaced: of one file and an index, readers would take either.

    Raises:
        NautileError: The disk is full or not writable.
    """
    state = dict(_named_tensors(model))
    tied = dict.fromkeys(_tied_names(model), state["model.embed_tokens.weight"])
    copies = {published: (state | tied)[ours] for published, ours in layout.copies.items()}
    tensors = _targets(model, layout) | tied | copies
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and size > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= size
    try:
        if len(shards) == 1:
            _write(shards[0], folder / SINGLE)
            (folder / INDEX).unlink(missing_ok=True)
            return
        weight_map = {}
        for i, shard in enumerate(shards, start=1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            _write(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
        (folder / SINGLE).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise NautileError(
            f"{folder}: the weights could not be written ({error})",
            "the disk is full or the folder is not writable",
            "free some space or name another folder, then save again",
        ) from error


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    # One storage per tensor: safetensors refuses views that share one. A shard at a time keeps the copies bounded.
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path, {"format": "pt"})


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _tied_names(model: nn.Module) -> set[str]:
    """Names that exist in files of tied models though they are the embedding again."""
    names = dict(model.named_parameters())
    return set() if "lm_head.weight" in names else {"lm_head.weight"}


def _targets(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Published name → the view of our parameter that it fills."""
    targets = {}
    for name, tensor in _named_tensors(model):
        for piece in layout.pieces(name, tensor):
            targets[piece.published] = tensor[piece.place] if piece.place else tensor
    return targets


def _listed(title: str, lines: list[str], most: int = 5) -> list[str]:
    if not lines:
        return []
    more = [f"    … and {len(lines) - most} more"] if len(lines) > most else []
    return [f"  {title}:", *(f"    {line}" for line in lines[:most]), *more]
