"""The header of a safetensors file: which tensors it holds, of what dtype and shape, and where their bytes lie.

The format (https://huggingface.co/docs/safetensors): 8 bytes of header length, little-endian; a JSON object
``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}``; then the tensors' bytes,
row-major and little-endian, without gaps. Offsets count from the end of the header.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nautile.core.errors import UserError
from nautile.core.json_file import unique_json

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST = 100_000_000
"""What the safetensors library accepts, too: a damaged length must not make us read the whole file as a header."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor. `begin` and `end` count bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape with all dimensions but the last as one, which counts the rows: stacked experts have many."""
        return flat(self.shape)


def flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[D0, D1, ..., Dn] as [D0·D1·…, Dn]; vectors and matrices as they are."""
    return shape if len(shape) <= 2 else (math.prod(shape[:-1]), shape[-1])


@dataclass(frozen=True)
class Header:
    """A checked header: tensors by name, and the position of the first tensor's first byte."""

    tensors: dict[str, TensorInfo]
    data: int


def read_header(path: Path, handle: int) -> Header:
    """Header of the open file `handle`, whose tensors have been checked to lie in the file, side by side.

    Raises:
        UserError: The file was cut short, is damaged, or is not safetensors.
    """
    size = os.fstat(handle).st_size
    length = header_length(path, os.pread(handle, 8, 0), size)
    return parse_header(path, os.pread(handle, length, 8), size)


def header_length(path: Path, start: bytes, size: int) -> int:
    """Bytes of the JSON object in a file of `size` bytes that begins with `start`.

    Raises:
        UserError: The file cannot hold that many.
    """
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length < 2 or length > min(_LONGEST, size - 8):
        raise damaged(path, f"its first 8 bytes promise a header of {length} bytes, the file has {size}")
    return length


def parse_header(path: Path, text: bytes, size: int) -> Header:
    """The checked header of a file of `size` bytes, of which `text` is the JSON object.

    Raises:
        UserError: As `read_header`.
    """
    try:
        entries = unique_json(text)
    except ValueError as error:
        raise damaged(path, f"its header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise damaged(path, "its header is not a JSON object")
    entries.pop("__metadata__", None)
    tensors = {name: _info(path, name, entry) for name, entry in entries.items()}
    position, before = 0, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            what = "overlaps" if info.begin < position else "leaves a gap after"
            raise damaged(path, f"{name} {what} {before}")
        position, before = info.end, name
    if position != size - 8 - len(text):
        raise damaged(path, f"its tensors need {8 + len(text) + position} bytes, the file has {size}")
    return Header(tensors, 8 + len(text))


def lay_out(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Where tensors go in a new file: those with larger elements first, otherwise in the order given.

    So every tensor starts at a multiple of its element size, which readers that map the file need.
    """
    infos = {}
    position = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        end = position + math.prod(shape) * dtype.itemsize
        infos[name] = TensorInfo(dtype, tuple(shape), position, end)
        position = end
    return infos


def encode(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The file's bytes up to the first tensor."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, info in infos.items():
        offsets = [info.begin, info.end]
        entries[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def damaged(path: Path, what: str) -> UserError:
    """The error for a file that is not what its name says."""
    return UserError(
        f"{path}: not a whole safetensors file ({what})",
        "it was cut short, damaged on the way, or is of another format",
        "copy or download the file again",
    )


def _info(path: Path, name: str, entry: Any) -> TensorInfo:
    match entry:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            type(size) is int and size >= 0 for size in shape
        ):
            pass
        case _:
            raise damaged(path, f"the header's entry of {name} is not dtype, shape and two offsets: {entry!r:.100}")
    if kind not in DTYPES:
        raise UserError(
            f"{path}: {name} has dtype {kind}, which nautile cannot read",
            f"it reads {', '.join(DTYPES)}",
            "convert the tensor with the tool that wrote it, or name another checkpoint",
        )
    dtype = DTYPES[kind]
    needed = math.prod(shape) * dtype.itemsize
    if begin < 0 or end - begin != needed:
        raise damaged(path, f"{name}, {kind} {shape}, needs {needed} bytes, its offsets are {begin} and {end}")
    return TensorInfo(dtype, tuple(shape), begin, end)
