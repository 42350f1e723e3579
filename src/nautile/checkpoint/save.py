"""From a model into a folder: safetensors in the published layout, one tensor at a time.

All new files, config.json included, are on the disk under temporary names before anything of an earlier model changes.
Then its config.json steps aside, one rename, of the index or of the single file, turns the weights from the old ones
into the new ones, and the new config.json takes its name. A process killed before that leaves the earlier model, one
killed after it the new one, and one killed in between a folder without config.json, which loading refuses: new weights
are never found beside an old configuration. What is left of the earlier model goes last.
"""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from nautile.checkpoint.compare import named_tensors, targets
from nautile.checkpoint.index import SAFETENSORS
from nautile.checkpoint.layout import Layout
from nautile.checkpoint.shard import ShardWriter
from nautile.core.atomic import disk_errors, sync

CONFIG = "config.json"
_STALE = re.compile(r"model-[\d-]+-of-\d+\.safetensors|\.(model[-.]|config\.json).*\.partial")
"""Shards, and what a process that was killed left unfinished."""


def save_from(
    model: nn.Module, folder: Path, layout: Layout, max_shard_bytes: int = 5 * 10**9, config: str | None = None
) -> None:
    """Write every parameter and buffer of `model` under its published name, in shards of at most `max_shard_bytes`.

    A tied parameter is written once, as transformers and vLLM expect; the copies that the layout lists are written.
    An earlier model in the folder is replaced.

    Args:
        model: Where the weights are.
        folder: Made if it is not there.
        layout: How they are published.
        max_shard_bytes: Size of a file; a larger tensor has one of its own.
        config: Contents of the model's config.json; None leaves the one that is there.

    Raises:
        DiskFullError: There is no room; the earlier model is as it was.
        NautileError: The folder is not writable; the earlier model is as it was.
    """
    tensors = published_tensors(model, layout)
    shards = split_shards({name: tensor.nbytes for name, tensor in tensors.items()}, max_shard_bytes)
    files = _file_names(folder, len(shards))
    texts = {} if config is None else {CONFIG: config}
    if len(files) > 1:
        texts[SAFETENSORS.index] = index_text(tensors, dict(zip(files, shards, strict=True)))
    writers: list[ShardWriter] = []
    try:
        for file, names in zip(files, shards, strict=True):
            kinds = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
            writers.append(ShardWriter(folder / file, kinds))
            for name in names:
                writers[-1].write(name, tensors[name])
            writers[-1].finish()
        for name, text in texts.items():
            _write_partial(folder / name, text)
        _switch(folder, writers, list(texts))
    except BaseException:
        for writer in writers:
            writer.discard()
        _remove(folder, _not_in_use(folder, files) | {_partial(folder / name).name for name in texts})
        raise
    with disk_errors(folder / SAFETENSORS.single):
        if len(files) > 1:
            (folder / SAFETENSORS.single).unlink(missing_ok=True)
        _remove(folder, {path.name for path in folder.iterdir() if _STALE.fullmatch(path.name)} - set(files))


def _switch(folder: Path, writers: list[ShardWriter], texts: list[str]) -> None:
    """Give the new files, all finished, their names, in the order that never mixes two models."""
    single = len(writers) == 1
    if not single:  # they take no old names, and nobody reads them before the index names them
        for writer in writers:
            writer.close()
    config, aside = folder / CONFIG, folder / f".{CONFIG}.earlier.partial"
    before = _in_use(folder)
    with disk_errors(config):
        try:
            if CONFIG in texts and config.exists():
                config.replace(aside)
                sync(folder)
            if single:
                writers[0].close()
                (folder / SAFETENSORS.index).unlink(missing_ok=True)
            else:
                _partial(folder / SAFETENSORS.index).replace(folder / SAFETENSORS.index)
            sync(folder)
            if CONFIG in texts:
                _partial(config).replace(config)
                sync(folder)
        except BaseException:
            if _in_use(folder) == before and aside.exists():
                aside.replace(config)
            raise


def _in_use(folder: Path) -> int | None:
    """Which file tells where the weights are: the number of the index or, without one, of the single file."""
    for path in (folder / SAFETENSORS.index, folder / SAFETENSORS.single):
        if path.exists():
            return path.stat().st_ino
    return None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _write_partial(path: Path, text: str) -> None:
    """Put what `path` is to hold on the disk, under its temporary name."""
    with disk_errors(path):
        _partial(path).write_text(text, "utf-8", newline="\n")
        sync(_partial(path))


def published_tensors(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Published name → the view of our parameter or buffer that is written there, copies included."""
    ours = dict(named_tensors(model))
    ours |= dict(model.named_parameters(remove_duplicate=False))
    return targets(model, layout) | {name: ours[source].detach() for name, source in layout.copies.items()}


def split_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in their order, in groups of at most `max_bytes`; a larger tensor has a group of its own."""
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def index_text(tensors: Mapping[str, Tensor], shards: Mapping[str, list[str]]) -> str:
    """The index file of `shards`, file name → names of its tensors."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _file_names(folder: Path, count: int) -> list[str]:
    """Names of `count` new files; beside the shards of an earlier model, such that none is taken."""
    if count == 1:
        return [SAFETENSORS.single]
    stems = itertools.chain(["model"], (f"model-{attempt}" for attempt in itertools.count(2)))
    candidates = ([f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] for stem in stems)
    return next(files for files in candidates if not any((folder / file).exists() for file in files))


def _not_in_use(folder: Path, files: list[str]) -> set[str]:
    """New files that the folder's index does not name yet: it does if writing failed after its rename."""
    index = folder / SAFETENSORS.index
    text = index.read_text("utf-8", errors="replace") if index.is_file() else ""
    return {file for file in files if file not in text} - {SAFETENSORS.single}


def _remove(folder: Path, names: set[str]) -> None:
    for name in sorted(names):
        (folder / name).unlink(missing_ok=True)
