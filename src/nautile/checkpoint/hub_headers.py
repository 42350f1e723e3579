"""The headers of a checkpoint on the Hub, without its tensors: some kilobytes from the start of each file.

So 690 GB of DeepSeek-V3 can be compared with its config.json in seconds, before anything of them is downloaded.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from nautile.checkpoint.header import TensorInfo, header_length, parse_header
from nautile.checkpoint.hub import LISTING_TIMEOUT, Remote, download
from nautile.checkpoint.hub_errors import told
from nautile.checkpoint.index import SAFETENSORS, check_index, weight_map_of
from nautile.checkpoint.source import Checkpoint, Reader, open_checkpoint, quantization_of
from nautile.core.errors import UserError
from nautile.core.log import progress

AT_ONCE = 8
"""Requests under way at a time."""
_START = 100_000
"""Offset of the last byte of the first request: most headers end before it."""


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


def open_remote(remote: Remote, allow_pickle: bool = False) -> tuple[Path, Checkpoint]:
    """A folder with the repository's configuration and tokenizer, and its tensors as far as headers tell.

    Weights that lie in the Hub's cache already are opened there.

    Args:
        remote: The repository.
        allow_pickle: Of one without safetensors, take pickled weights, which have to be downloaded for it.

    Raises:
        UserError: There is no such repository, it has no safetensors, a file is damaged, or its quantisation is not
            supported.
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
    quantization = quantization_of(config)
    index = folder / SAFETENSORS.index
    weight_map = weight_map_of(index) if index.is_file() else {}
    files = sorted(set(weight_map.values())) or [SAFETENSORS.single]
    if all((folder / file).is_file() for file in files):
        return folder, open_checkpoint(folder)
    try:
        readers = _headers(remote, folder, files)
    except _AbsentError:
        if not allow_pickle or weight_map:
            raise
        folder = download(remote, allow_pickle=True)
        return folder, open_checkpoint(folder, allow_pickle=True)
    check_index(index, weight_map, {reader.path.name: set(reader.tensors) for reader in readers})
    return folder, Checkpoint(folder, readers, quantization)


class _AbsentError(UserError):
    """The repository has no such file."""


def _headers(remote: Remote, folder: Path, files: list[str]) -> list[Reader]:
    readers: list[Reader] = []
    with progress(f"{remote}: headers", len(files)) as bar, ThreadPoolExecutor(AT_ONCE) as pool:
        for reader in pool.map(partial(_header, remote, folder), files):
            readers.append(reader)
            bar.advance()
    return readers


def _header(remote: Remote, folder: Path, file: str) -> RemoteHeader:
    """The header of one file, checked as that of a local one is."""
    from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError

    name = Path(f"{remote}/{file}")
    try:
        start, size = _fetch(remote, file, 0, _START)
        length = header_length(name, start, size)
        text = start[8 : 8 + length]
        if len(text) < length:
            text += _fetch(remote, file, len(start), 7 + length)[0]
    except RemoteEntryNotFoundError:
        raise _AbsentError(
            f"{remote} has no {file}",
            "weights are read from safetensors",
            "name a repository with config.json and safetensors",
        ) from None
    except (HTTPError, OSError) as error:
        raise told(error, str(remote)) or error from error
    return RemoteHeader(folder / file, parse_header(name, text[:length], size).tensors)


def _fetch(remote: Remote, file: str, first: int, last: int) -> tuple[bytes, int]:
    """Bytes `first` to `last` of a file, or as many as there are, and the bytes of the whole file."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(remote.id, file, revision=remote.revision)
    headers = {**build_hf_headers(), "range": f"bytes={first}-{last}"}
    answer = get_session().get(url, headers=headers, timeout=LISTING_TIMEOUT)
    if answer.status_code == 416:  # there is no first byte: the file is empty
        return b"", 0
    hf_raise_for_status(answer)
    size = answer.headers.get("content-range", "").rpartition("/")[2]
    if answer.status_code != 206 or not size.isdecimal():  # a server without ranges sends all
        return answer.content[first : last + 1], len(answer.content)
    return answer.content, int(size)
