"""One pickled ``pytorch_model*.bin`` file, read like a safetensors file, for people who trust it.

Only on demand: unpickling runs what the file says. torch's restricted unpickler (``weights_only``) builds tensors and
plain containers and refuses everything else.
"""

import pickle
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from nautile.checkpoint.casts import cast_into
from nautile.checkpoint.header import NAMES, TensorInfo
from nautile.core.errors import UserError

_DAMAGED = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, AssertionError),
    *(struct.error, OverflowError, MemoryError, zipfile.BadZipFile),
)
"""What torch.load raises on files with flipped or missing bytes."""


class PickledReader:
    """The tensors of a pickled file, mapped into memory rather than read, unless torch older than 1.6 wrote it.

    Raises:
        UserError: The file is missing or damaged, holds more than tensors by name, or asks for code to be run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: not only tensors, or damaged ({_first_line(error)})",
                "reading on could run code of the file, and nautile does not",
                "download the safetensors of this model, or the file again",
            ) from error
        except _DAMAGED as error:
            raise UserError(
                f"{path}: cannot be read as a file of torch.save ({_first_line(error)})",
                "it was cut short, damaged on the way, or is of another format",
                "copy or download the file again",
            ) from error
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
        ):
            raise UserError(
                f"{path}: not a table of tensors by name",
                "weights are published as such tables (state dicts)",
                "name a folder of published weights, not a training checkpoint",
            )
        self._stored: dict[str, Tensor] = {}
        self.tensors: dict[str, TensorInfo] = {}
        position = 0
        for name, tensor in found.items():
            if problem := _problem(name, tensor):
                raise UserError(
                    f"{path}: {name!a} {problem}",
                    "weights are plain arrays of numbers, stored whole",
                    "save the model again with plain tensors, or download its safetensors",
                )
            stored = self._stored[name] = tensor.detach().resolve_conj().resolve_neg()
            self.tensors[name] = TensorInfo(stored.dtype, tuple(stored.shape), position, position + stored.nbytes)
            position += stored.nbytes

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """The tensor as stored, or `out` filled with it and converted to its dtype and device."""
        return self._copied(name, self._stored[name], out)

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows ``start:stop`` of the tensor (`TensorInfo.rows`), as stored or in `out`."""
        return self._copied(name, self._stored[name].reshape(self.tensors[name].rows)[start:stop], out)

    def close(self) -> None:
        """Let go of the mapped file."""
        self._stored = {}

    def _copied(self, name: str, stored: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            return stored.clone(memory_format=torch.contiguous_format)
        cast_into(out.detach(), stored, f"{self.path}: {name}")
        return out


def _problem(name: str, tensor: Tensor) -> str | None:
    """Why a tensor cannot be read; None if it can."""
    if tensor.is_meta:
        return "has no contents (it is a meta tensor)"
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_nested:
        kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else "sparse"
        return f"is a {kind} tensor"
    if tensor.dtype not in NAMES:
        return f"has dtype {str(tensor.dtype).removeprefix('torch.')}, which safetensors do not know"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is a name with half of a character"
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
