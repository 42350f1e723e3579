"""From a folder into a model: every byte is read once, into the place where it stays.

Several tensors, or portions of large ones, are read at once, since reading and converting leave Python's lock alone.
Peak memory is the model and a scratch of a few MiB per thread.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nautile.checkpoint.compare import compare, targets
from nautile.checkpoint.layout import Layout
from nautile.checkpoint.source import Checkpoint
from nautile.core.errors import UserError
from nautile.core.log import progress
from nautile.core.machine import cores

_JOB = 16 << 20
"""Bytes of the destination that one thread fills at a time, so that one large embedding keeps all threads busy."""
_THREADS = 8
"""At most; otherwise one per core."""
_LONG = 4.0
"""Gigabytes of a model from which on the reading shows how far it is."""


def load_into(model: nn.Module, checkpoint: Checkpoint, layout: Layout) -> None:
    """Check that `checkpoint` fits `model`, then fill it.

    Raises:
        UserError: As `check_fit`; nothing has been copied then.
    """
    check_fit(model, checkpoint, layout)
    fill(model, checkpoint, layout)


def check_fit(model: nn.Module, checkpoint: Checkpoint, layout: Layout) -> None:
    """Refuse a checkpoint that does not fill `model` exactly. The model may be on the meta device.

    Raises:
        UserError: Tensors are missing, not expected, of another shape, or not readable as numbers.
    """
    comparison = compare(model, checkpoint, layout)
    if not comparison.fits:
        raise UserError(
            f"{checkpoint.folder}: the weights do not fit config.json\n{comparison.report()}",
            "every tensor of the model must be there, in its shape, and nothing else",
            "check that config.json and the weights belong together",
        )


def fill(model: nn.Module, checkpoint: Checkpoint, layout: Layout) -> None:
    """Read every parameter and buffer of a `model` that fits, converting dtypes and dequantising FP8 blocks."""
    jobs = _jobs(targets(model, layout), checkpoint)
    gigabytes = sum(job.out.nbytes for job in jobs) / 1e9
    title = f"reading {gigabytes:.1f} GB of weights, portions"
    threads = torch.get_num_threads()
    try:
        with (
            progress(title, len(jobs)) if gigabytes >= _LONG else nullcontext() as bar,
            ThreadPoolExecutor(min(_THREADS, cores()), initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            for _ in pool.map(lambda job: job.run(checkpoint), jobs):
                if bar is not None:
                    bar.advance()
    finally:
        torch.set_num_threads(threads)  # of threads that are yet to start; this one has kept its number


@dataclass(frozen=True)
class _Job:
    """Fill `out` with `rows` of the published tensor `name`, or with all of it."""

    name: str
    rows: slice | None
    out: Tensor

    def run(self, checkpoint: Checkpoint) -> None:
        with torch.no_grad():  # each thread has its own switch
            checkpoint.weight(self.name, self.out, self.rows)


def _jobs(needed: dict[str, Tensor], checkpoint: Checkpoint) -> list[_Job]:
    """The work in the order in which it lies on the disk, in portions of at most `_JOB`."""
    order = sorted(needed, key=lambda name: (checkpoint.files[name], checkpoint.infos[name].begin))
    jobs = []
    for name in order:
        out = needed[name]
        rows = len(out) if out.dim() else 1
        step = max(1, _JOB * rows // max(out.numel() * out.element_size(), 1))
        if checkpoint.quantization:  # whole blocks, so that no row of scales is expanded twice
            step = -(-step // checkpoint.quantization.block[0]) * checkpoint.quantization.block[0]
        if step >= rows or out.dim() > 2:
            jobs.append(_Job(name, None, out))
        else:
            jobs += [_Job(name, slice(at, min(at + step, rows)), out[at : at + step]) for at in range(0, rows, step)]
    return jobs
