"""One safetensors file, read straight into its destination and written one tensor at a time.

The library of the same name maps files into memory, which costs a second copy of every tensor while loading, and takes
all tensors of a file at once when writing. Here the peak is the destination plus a few MiB.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from nautile.checkpoint.casts import cast_into
from nautile.checkpoint.header import TensorInfo, damaged, encode, lay_out, read_header
from nautile.core.atomic import disk_errors, sync
from nautile.core.errors import UserError

SCRATCH = 8 << 20
"""Bytes held at a time where a tensor cannot be read into its destination, or written from its place, directly."""
_CALL = 1 << 30
"""Bytes asked of the system at once: Linux moves at most 2 GiB per call."""


class ShardReader:
    """An open safetensors file whose header has been read and checked.

    Several threads may read at once: every read names its position.

    Raises:
        UserError: The file is missing, cannot be read, was cut short, or is not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = -1
        try:
            self._handle = os.open(path, os.O_RDONLY)
            header = read_header(path, self._handle)
        except OSError as error:
            self.close()
            raise UserError(
                f"{path}: cannot be read ({error.strerror})",
                "weights are stored in it",
                "check that the file is there and that you may read it",
            ) from error
        except UserError:
            self.close()
            raise
        self.tensors: dict[str, TensorInfo] = header.tensors
        self._data = header.data

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """The tensor as stored, or `out` filled with it and converted to its dtype and device.

        `out` has the stored shape. A contiguous one of the stored dtype in main memory is read into directly; any other
        one is filled over a scratch of a few MiB.

        Raises:
            UserError: A number of the tensor would become infinity in `out`.
        """
        shape = self.tensors[name].shape
        return self._read(name, 0, shape, out)

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows ``start:stop`` of the tensor (`TensorInfo.rows`), as stored or in `out`: [stop - start, row]."""
        shape = self.tensors[name].rows
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"{name} {list(shape)} has no rows {start}:{stop}")
        return self._read(name, start, (stop - start, *shape[1:]), out)

    def _read(self, name: str, start: int, shape: tuple[int, ...], out: Tensor | None) -> Tensor:
        info = self.tensors[name]
        if out is None:
            out = torch.empty(shape, dtype=info.dtype)
        if tuple(out.shape) != shape:
            raise ValueError(f"{name}: out is {list(out.shape)}, the stored part {list(shape)}")
        if not out.numel():
            return out
        into = out.detach()
        row_bytes = math.prod(shape[1:]) * info.dtype.itemsize
        begin = self._data + info.begin + start * row_bytes
        if into.dtype == info.dtype and into.device.type == "cpu" and into.is_contiguous():
            self._fill(into, begin)
            return out
        rows = into if info.shape else into.unsqueeze(0)
        step = max(1, SCRATCH // row_bytes)
        scratch = torch.empty((min(step, len(rows)), *rows.shape[1:]), dtype=info.dtype)
        for row, part in zip(range(0, len(rows), step), rows.split(step), strict=True):
            self._fill(scratch[: len(part)], begin + row * row_bytes)
            cast_into(part, scratch[: len(part)], f"{self.path}: {name}")
        return out

    def _fill(self, tensor: Tensor, position: int) -> None:
        view = memory(tensor)
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._handle, [view[done : done + _CALL]], position + done)
            except OSError as error:
                raise damaged(self.path, f"reading failed: {error.strerror}") from error
            if got == 0:
                raise damaged(self.path, "it ends before its tensors do")
            done += got

    def close(self) -> None:
        """Give the file back; nothing can be read afterwards."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardWriter:
    """A safetensors file in the making: its header first, then each announced tensor once, in any order.

    The file has a temporary name until `close`, which flushes it to the disk and renames it. Leaving the context with
    an exception, a failed write, or `discard` removes it, and what stood at `path` before is as it was.

    Args:
        path: Where the whole file will stand.
        tensors: Name → dtype and shape of every tensor that will be written.
        metadata: Text beside the tensors. transformers looks for ``{"format": "pt"}``, the default.

    Raises:
        DiskFullError: There is no room; from `write` and `close`, too.
        NautileError: The place is not writable; from `write` and `close`, too.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = lay_out(tensors)
        self._partial = path.with_name(f".{path.name}.partial")
        self._waiting = {name: info.nbytes for name, info in self.tensors.items()}
        self._handle = -1
        header = encode(self.tensors, {"format": "pt"} if metadata is None else metadata)
        self._data = len(header)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        with self._or_discard():
            self._put(memoryview(header), 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one announced tensor, from any device and memory layout; no more than a few MiB are copied."""
        if tuple(tensor.shape) != self.tensors[name].shape:
            raise ValueError(f"{name}: {list(tensor.shape)} is not the announced {self.tensors[name]}")
        self._write(name, 0, tensor)

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Write rows of an announced tensor (`TensorInfo.rows`), from row `start` on; every row comes once."""
        shape = self.tensors[name].rows
        if not shape or tuple(rows.shape[1:]) != shape[1:] or not 0 <= start <= shape[0] - len(rows):
            raise ValueError(f"{name}: {list(rows.shape)} from row {start} is no part of the announced {list(shape)}")
        self._write(name, start, rows)

    def _write(self, name: str, start: int, tensor: Tensor) -> None:
        info, source = self.tensors[name], tensor.detach()
        if source.dtype != info.dtype or source.nbytes > self._waiting[name]:
            raise ValueError(f"{name}: {source.dtype} is not the announced {info}, or comes twice")
        if not source.numel():
            return
        position = self._data + info.begin + start * math.prod(info.rows[1:]) * info.dtype.itemsize
        with self._or_discard():
            if source.device.type == "cpu" and source.is_contiguous():
                parts = [source]
            else:
                rows = source if info.shape else source.unsqueeze(0)
                parts = rows.split(max(1, SCRATCH * len(rows) // source.nbytes))
            for part in parts:
                self._put(memory(part.cpu().contiguous()), position)
                position += part.nbytes
        self._waiting[name] -= source.nbytes

    def finish(self) -> None:
        """Flush all bytes to the disk; the file still has its temporary name."""
        with self._or_discard():
            waiting = sorted(name for name, count in self._waiting.items() if count)
            if waiting:
                raise ValueError(f"{self.path}: announced, not written: {', '.join(waiting[:5])}")
            os.fsync(self._handle)
            self._close()

    def close(self) -> None:
        """Finish the file and give it its name."""
        if self._handle >= 0:
            self.finish()
        with self._or_discard():
            self._partial.replace(self.path)
            sync(self.path.parent)

    def discard(self) -> None:
        """Remove the unfinished file."""
        self._close()
        self._partial.unlink(missing_ok=True)

    @contextmanager
    def _or_discard(self) -> Iterator[None]:
        try:
            with disk_errors(self.path):
                yield
        except BaseException:
            self.discard()
            raise

    def _put(self, view: memoryview, position: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._handle, view[done : done + _CALL], position + done)

    def _close(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in main memory, in place."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
