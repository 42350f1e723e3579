"""One file at a time: read and cast by several threads, written in order, then read back from the disk and compared."""

import hashlib
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from nautile.checkpoint.convert.job import Job, Piece, chunks, make
from nautile.checkpoint.convert.plan import Shard
from nautile.checkpoint.shard import ShardReader, ShardWriter, memory
from nautile.checkpoint.source import Checkpoint
from nautile.core.errors import NautileError, UserError

T = TypeVar("T")
Sums = list[int]
"""CRC-32 of every piece of a file, in the order of its jobs and chunks."""
AHEAD = 2
"""Chunks per thread that may wait to be written."""


class Threads(ThreadPoolExecutor):
    """A pool whose threads each compute alone: several chunks are in work at once, so none need be shared."""

    def __init__(self, count: int) -> None:
        super().__init__(count, "convert", lambda: torch.set_num_threads(1))
        self.count = count


def write(
    shard: Shard, path: Path, checkpoint: Checkpoint, pool: Threads, advance: Callable[[int], None]
) -> tuple[ShardWriter, Sums]:
    """Write a file up to the step that flushes it and gives it its name, which is left to the caller.

    Args:
        shard: What goes into it.
        path: Where it goes.
        checkpoint: Where the weights come from.
        pool: Threads that read and cast.
        advance: Called with the bytes written since the last call.

    Raises:
        DiskFullError: There is no room; nothing is left of the file.
    """
    writer = ShardWriter(path, {output.name: (output.dtype, output.shape) for output in shard.outputs()})
    sums: Sums = []

    def task(job: Job, pieces: tuple[Piece, ...]) -> Callable[[], list[tuple[Piece, Tensor, int]]]:
        return lambda: [
            (piece, tensor, zlib.crc32(memory(tensor)))
            for piece, tensor in zip(pieces, make(checkpoint, job, pieces), strict=True)
        ]

    try:
        tasks = (task(job, pieces) for job in shard.jobs for pieces in chunks(job))
        for made in in_order(pool, tasks):
            for piece, tensor, checksum in made:
                if piece.output.shape:
                    writer.write_rows(piece.output.name, piece.start, tensor)
                else:
                    writer.write(piece.output.name, tensor)
                sums.append(checksum)
                advance(tensor.nbytes)
    except BaseException:
        writer.discard()
        raise
    return writer, sums


def close(writer: ShardWriter, shard: Shard, path: Path, sums: Sums, pool: Threads) -> None:
    """Flush a written file, read it back and compare.

    Raises:
        DiskFullError: There was no room after all.
        NautileError: What is read is not what was written; the file has been removed.
    """
    writer.close()
    forget(path)
    problem = difference(shard, path, sums, pool)
    if problem:
        path.unlink()
        raise NautileError(
            f"{path}: {problem}",
            "what was read back from the disk is not what was written: disk, cable or memory may be failing",
            "run the same command again, which keeps the files that are good; check the machine if it happens twice",
        )


def difference(shard: Shard, path: Path, sums: Sums, pool: Threads) -> str | None:
    """How the file differs from what it should hold; None if it does not."""
    with ShardReader(path) as reader:
        problem = misfit(shard, reader)
        if problem:
            return problem
        pieces = all_pieces(shard)
        for piece, found, wanted in zip(pieces, _checksums(reader, all_pieces(shard), pool), sums, strict=True):
            if found != wanted:
                return f"{piece.output.name} differs in rows {piece.start} to {piece.stop - 1}"
    return None


def misfit(shard: Shard, reader: ShardReader) -> str | None:
    """How the file's header differs from the plan; None if it does not."""
    for output in shard.outputs():
        info = reader.tensors.get(output.name)
        if info is None or (info.dtype, info.shape) != (output.dtype, output.shape):
            return f"{output.name} is not there as {output.dtype} {list(output.shape)}"
    if len(reader.tensors) != sum(1 for _ in shard.outputs()):
        return "it holds tensors that nobody wrote"
    return None


def checksums(shard: Shard, path: Path, pool: Threads) -> Sums | None:
    """Checksums of a file found on the disk; None when it is not a whole file of this shard."""
    try:
        with ShardReader(path) as reader:
            return None if misfit(shard, reader) else list(_checksums(reader, all_pieces(shard), pool))
    except UserError:  # not there, or damaged
        return None


def all_pieces(shard: Shard) -> Iterator[Piece]:
    """Every piece of a file, in the order of `Sums`."""
    for job in shard.jobs:
        for pieces in chunks(job):
            yield from pieces


def fold(sums: Sums) -> str:
    """One checksum of a whole file, for the manifest."""
    return hashlib.sha256(b"".join(one.to_bytes(4, "little") for one in sums)).hexdigest()


def in_order(pool: Threads, tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results of `tasks` in their order, a few of them computed ahead."""
    waiting: deque[Future[T]] = deque()
    most = AHEAD * pool.count
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def forget(path: Path) -> None:
    """Ask the system to drop the file's pages from memory, so that the next read comes from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _checksums(reader: ShardReader, pieces: Iterable[Piece], pool: Threads) -> Iterator[int]:
    def task(piece: Piece) -> Callable[[], int]:
        return lambda: zlib.crc32(memory(_stored(reader, piece)))

    return in_order(pool, (task(piece) for piece in pieces))


def _stored(reader: ShardReader, piece: Piece) -> Tensor:
    if not piece.output.shape:
        return reader.read(piece.output.name)
    return reader.read_rows(piece.output.name, piece.start, piece.stop)
