"""One weight on its way: which rows and columns are read, what becomes of them, and under which names they go.

A job is worked off in chunks of rows, so memory depends on the chunk, not on the weight. Its outputs are known from
headers alone, and a chunk's place in each output is known from its rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from nautile.checkpoint.fp8 import Fp8Format, quantize, scale_shape
from nautile.checkpoint.header import flat
from nautile.checkpoint.source import Checkpoint

CHUNK = 2 << 20
"""Numbers of a weight held at a time: 8 MiB in float32, which caches still hold."""


class Cast(Enum):
    """What happens to the numbers."""

    KEEP = "keep"
    """Copied bit by bit, FP8 weights and their scales, too."""
    FLOAT = "float"
    """Dequantised if FP8, then rounded once to the output's dtype."""
    FP8 = "fp8"
    """Quantised in blocks; the scales are a second output."""


@dataclass(frozen=True)
class Part:
    """The range ``start:stop`` along `dim` (0 or 1) of a stored tensor."""

    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Output:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Job:
    """A stored tensor, or a part of it, and the one or two outputs made of it."""

    source: str
    cast: Cast
    weight: Output
    part: Part | None = None
    scale: Output | None = None
    """Where the scales go; given with `Cast.FP8` only."""
    format: Fp8Format | None = None
    """How to quantise; given with `Cast.FP8` only."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """All that this job writes."""
        return (self.weight,) if self.scale is None else (self.weight, self.scale)


@dataclass(frozen=True)
class Piece:
    """Rows ``start:stop`` (`header.flat`) of one output; a tensor without dimensions has the one row 0:1."""

    output: Output
    start: int
    stop: int


def quantising(source: str, weight: Output, scale_name: str, fmt: Fp8Format, part: Part | None = None) -> Job:
    """The job that quantises a weight, or `part` of it, into `weight` and scales of the shape that follows."""
    scale = Output(scale_name, torch.float32, scale_shape(weight.shape, fmt.block))
    return Job(source, Cast.FP8, weight, part, scale, fmt)


def chunks(job: Job) -> Iterator[tuple[Piece, ...]]:
    """The job's pieces in their order, one per output and chunk; chunks of FP8 begin with a block."""
    shape = flat(job.weight.shape)
    rows = shape[0] if shape else 1
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    block = job.format.block[0] if job.format else 1
    step = max(block, step // block * block)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        pieces = [Piece(job.weight, start, stop)]
        if job.scale is not None:
            pieces.append(Piece(job.scale, start // block, -(-stop // block)))
        yield tuple(pieces)


def make(checkpoint: Checkpoint, job: Job, pieces: tuple[Piece, ...]) -> list[Tensor]:
    """The contents of one chunk's `pieces`, contiguous and in main memory.

    Raises:
        UserError: The numbers cannot be held in the wanted dtype.
    """
    stored = _read(checkpoint, job, pieces[0].start, pieces[0].stop)
    if job.part is not None and job.part.dim == 1:
        stored = stored[:, job.part.start : job.part.stop].contiguous()
    if job.cast is not Cast.FP8:
        return [stored]
    assert job.format
    rows = f"{job.source} (counted from row {pieces[0].start})" if pieces[0].start else job.source
    return [*quantize(stored, job.format.block, job.format.scale_fmt, rows)]


def _read(checkpoint: Checkpoint, job: Job, start: int, stop: int) -> Tensor:
    info = checkpoint.infos[job.source]
    if not info.shape:
        rows, shape = None, ()
    else:
        first = job.part.start if job.part is not None and job.part.dim == 0 else 0
        rows, shape = slice(first + start, first + stop), (stop - start, *info.rows[1:])
    if job.cast is not Cast.FLOAT:
        return checkpoint.stored(job.source, rows=rows)
    return checkpoint.weight(job.source, torch.empty(shape, dtype=job.weight.dtype), rows)
