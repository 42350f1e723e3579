"""The headers of a checkpoint on the Hub, without its tensors: some kilobytes from the start of each file.

So 690 GB of DeepSeek-V3 can be compared with its config.json in seconds, before anything of them is downloaded.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from nautile.checkpoint.fp8 import read_quantization
from nautile.checkpoint.header import DTYPES, TensorInfo
from nautile.checkpoint.hub import Remote, download
from nautile.checkpoint.hub_errors import told
from nautile.checkpoint.index import SAFETENSORS, check_index
from nautile.checkpoint.source import Checkpoint, Reader, open_checkpoint
from nautile.core.errors import UserError
from nautile.core.log import progress

AT_ONCE = 8
"""Requests under way at a time."""


class RemoteHeader:
    """Stands for one file on the Hub whose header is known; it can be compared, not read."""

    def __init__(self, path: Path, tensors: dict[str, TensorInfo]) -> None:
        self.path, self.tensors = path, tensors

    def read(self, name: str, out: Tensor | None = None) -> NoReturn:
        """Refuse: the tensor is not here."""
        raise AssertionError(f"{name} of {self.path.name} has not been downloaded")

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> NoReturn:
        """Refuse likewise."""
        self.read(name)

    def close(self) -> None:
        """Nothing is open."""


def open_remote(remote: Remote) -> tuple[Path, Checkpoint]:
    """A folder with the repository's configuration and tokenizer, and its tensors as far as headers tell.

    Weights that lie in the Hub's cache already are opened there.

    Raises:
        UserError: There is no such repository, it has no safetensors, or its quantisation is not supported.
        NautileError: The Hub cannot be reached.
    """
    folder = download(remote, weights=False)
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(
            f"{remote} has no config.json",
            "the model's family and shape are read from it",
            "name the repository of the model itself, in the Hugging Face format",
        )
    published = json.loads(config.read_bytes())
    index = folder / SAFETENSORS.index
    weight_map = json.loads(index.read_bytes())["weight_map"] if index.is_file() else {}
    files = sorted(set(weight_map.values())) or [SAFETENSORS.single]
    if all((folder / file).is_file() for file in files):
        return folder, open_checkpoint(folder)
    with progress(f"{remote}: headers", len(files)) as bar, ThreadPoolExecutor(AT_ONCE) as pool:
        readers: list[Reader] = []
        for reader in pool.map(partial(_header, remote, folder), files):
            readers.append(reader)
            bar.advance()
    if weight_map:
        check_index(index, weight_map, {reader.path.name: set(reader.tensors) for reader in readers})
    return folder, Checkpoint(folder, readers, read_quantization(published, str(config)))


def _header(remote: Remote, folder: Path, file: str) -> RemoteHeader:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError

    try:
        header = HfApi().parse_safetensors_file_metadata(remote.id, file, revision=remote.revision)
    except RemoteEntryNotFoundError:
        raise UserError(
            f"{remote} has no {file}",
            "weights are read from safetensors",
            "name a repository with config.json and safetensors",
        ) from None
    except (HTTPError, OSError) as error:
        raise told(error, str(remote)) or error from error
    unknown = sorted({info.dtype for info in header.tensors.values()} - DTYPES.keys())
    if unknown:
        raise UserError(
            f"{remote}: {file} holds tensors of dtype {', '.join(unknown)}, which nautile cannot read",
            f"it reads {', '.join(DTYPES)}",
            "name another checkpoint, such as the one that this one was made from",
        )
    infos = {
        name: TensorInfo(DTYPES[info.dtype], tuple(info.shape), *info.data_offsets)
        for name, info in header.tensors.items()
    }
    return RemoteHeader(folder / file, infos)
