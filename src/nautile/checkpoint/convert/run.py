"""`convert`: one folder of weights into another, streaming, resumable, read back before it gets its name."""

import shutil
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nautile.checkpoint.convert import shards
from nautile.checkpoint.convert.checks import check_source, check_whole
from nautile.checkpoint.convert.manifest import Manifest
from nautile.checkpoint.convert.options import Options
from nautile.checkpoint.convert.place import Place
from nautile.checkpoint.convert.plan import Plan, Shard, make_plan
from nautile.checkpoint.shard import ShardWriter
from nautile.checkpoint.source import Checkpoint, open_checkpoint
from nautile.core.atomic import disk_errors, sync
from nautile.core.errors import DiskFullError
from nautile.core.log import Progress, log, progress, warn
from nautile.core.machine import cores

SPARE = 64 << 20
"""Free bytes that a conversion leaves on the disk."""
_MEGABYTE = 10**6
_THREADS = 8
"""At most, unless more are asked for: each holds some chunks, and writing waits for the disk."""


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    destination: Path
    files: int
    tensors: int
    bytes_in: int
    bytes_out: int
    """Bytes of all weights written, whenever that was."""
    bytes_resumed: int
    """Those of them that an earlier, interrupted run had finished."""
    seconds: float
    notes: list[str]
    left_out: list[str]
    """Files and folders of the source that were not copied."""


def convert(source: Path, destination: Path, options: Options, threads: int | None = None) -> Summary:
    """Convert the weights in `source` and copy what is beside them; `destination` appears when all is whole.

    A run that was interrupted is continued by the same call: finished files are checked and kept.

    Args:
        source: A folder as Hugging Face publishes them. It is never written to.
        destination: A folder that is empty or does not exist.
        options: What to do.
        threads: That read and cast; None for one per core, at most 8.

    Raises:
        UserError: It cannot be done, and nothing has been written.
        DiskFullError: There is no room; finished files are kept for the next call.
        NautileError: The source changed meanwhile, or what was written cannot be read back.
    """
    begun = time.monotonic()
    place = Place(source, destination)
    with (
        open_checkpoint(source, options.allow_pickle) as checkpoint,
        _threads(threads or min(_THREADS, cores())) as pool,
    ):
        plan = make_plan(checkpoint, options)
        with place.held():
            wanted = Manifest.begin(checkpoint, options, plan)
            if place.renamed:
                done = _already_whole(place, wanted, plan)
            else:
                done = _work(place, wanted, plan, options, checkpoint, pool)
        return Summary(
            destination=place.destination,
            files=len(plan.shards),
            tensors=sum(1 for shard in plan.shards for _ in shard.outputs()),
            bytes_in=sum(info.nbytes for info in checkpoint.infos.values()),
            bytes_out=sum(shard.tensor_bytes for shard in plan.shards),
            bytes_resumed=sum(shard.tensor_bytes for shard in plan.shards if shard.file in done),
            seconds=time.monotonic() - begun,
            notes=plan.notes,
            left_out=plan.beside.left_out,
        )


def _work(
    place: Place, wanted: Manifest, plan: Plan, options: Options, checkpoint: Checkpoint, pool: shards.Threads
) -> set[str]:
    """Do what an earlier run has not done yet; the files that were there from it."""
    manifest = _manifest(place, wanted)
    done = _finished(place, manifest, plan, pool)
    try:
        _check_room(place, checkpoint.folder, plan, done)
        _write_shards(place, manifest, plan, done, checkpoint, pool)
        check_source(checkpoint, manifest)
        _write_beside(place, plan, checkpoint.folder)
        check_whole(place.files, plan, options)
    except BaseException:
        if not manifest.done:
            place.abandon()
        raise
    place.finish()
    return done


def _already_whole(place: Place, wanted: Manifest, plan: Plan) -> set[str]:
    """All files, where a run was killed after its result got its name; only its notes are removed."""
    found, files = Manifest.read(place.work), {shard.file for shard in plan.shards}
    here = {path.name for path in place.destination.iterdir()}
    if found is None or wanted.difference(found) or not files == set(found.done) <= here:
        place.refuse()
    place.abandon()
    log(f"{place.destination} is finished: an earlier run was stopped after its last step")
    return files


@contextmanager
def _threads(count: int) -> Generator[shards.Threads]:
    before = torch.get_num_threads()
    try:
        with shards.Threads(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # torch's number is one for all threads to come


def _manifest(place: Place, wanted: Manifest) -> Manifest:
    """That of the interrupted run if it can be continued, else `wanted`."""
    found = Manifest.read(place.work)
    if found is not None:
        difference = wanted.difference(found)
        if difference is None:
            return found
        log(f"starting over, not where an earlier run stopped: {difference}")
    wanted.write(place.work)  # first: a work folder without one is taken for somebody else's
    place.clear()
    return wanted


def _finished(place: Place, manifest: Manifest, plan: Plan, pool: shards.Threads) -> set[str]:
    """Files of an earlier run that still hold what they held; all others are removed."""
    wanted = {shard.file: shard for shard in plan.shards if shard.file in manifest.done}
    good = set()
    with progress("checking finished files", len(wanted)) as bar:
        for file, shard in wanted.items():
            sums = shards.checksums(shard, place.files / file, pool)
            if sums is not None and shards.fold(sums) == manifest.done[file]:
                good.add(file)
            else:
                warn(f"{place.files / file} is not as it was written; it is made again")
            bar.advance()
    if good:
        log(f"going on where an earlier run stopped: {len(good)} of {len(plan.shards)} files are there")
    manifest.done = {file: fold for file, fold in manifest.done.items() if file in good}
    with disk_errors(place.files):
        place.files.mkdir(exist_ok=True)
        for path in place.files.iterdir():
            if path.name not in good:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return good


def _check_room(place: Place, source: Path, plan: Plan, done: set[str]) -> None:
    copied = sum((source / path).stat().st_size for path in plan.beside.copied)
    need = copied + sum(shard.file_bytes for shard in plan.shards if shard.file not in done)
    free = shutil.disk_usage(place.work).free
    if need + SPARE > free:
        raise DiskFullError(
            f"{place.destination} needs {(need + SPARE) / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free there",
            "the disk would fill before the work is done",
            "free some space, or choose a destination on another disk",
        )


def _write_shards(
    place: Place, manifest: Manifest, plan: Plan, done: set[str], checkpoint: Checkpoint, pool: shards.Threads
) -> None:
    """Write all files that are not done; while one is flushed and read back, the next is already being written."""
    total = sum(shard.tensor_bytes for shard in plan.shards)
    start = sum(shard.tensor_bytes for shard in plan.shards if shard.file in done)
    closing: Future[None] | None = None

    def close(writer: ShardWriter, shard: Shard, sums: shards.Sums) -> None:
        shards.close(writer, shard, place.files / shard.file, sums, pool)
        manifest.done[shard.file] = shards.fold(sums)
        manifest.write(place.work)

    with (
        progress("converting, MB", total // _MEGABYTE, start // _MEGABYTE) as bar,
        ThreadPoolExecutor(1, "read back") as closer,
    ):
        advance = _meter(bar, total, start)
        for shard in plan.shards:
            if shard.file in done:
                continue
            writer, sums = shards.write(shard, place.files / shard.file, checkpoint, pool, advance)
            try:
                if closing is not None:
                    closing.result()
            except BaseException:
                writer.discard()
                raise
            closing = closer.submit(close, writer, shard, sums)
        if closing is not None:
            closing.result()


def _meter(bar: Progress, total: int, start: int) -> Callable[[int], None]:
    """Counts bytes into a bar of megabytes, with the rate of this run and the time that is left at it."""
    begun, done, shown = time.monotonic(), start, start // _MEGABYTE

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        if done // _MEGABYTE > shown:
            rate = (done - start) / max(time.monotonic() - begun, 1e-3)
            left = (total - done) / rate
            bar.advance(done // _MEGABYTE - shown, f"{rate / 1e6:.0f} MB/s, {left // 60:.0f}:{left % 60:02.0f} left")
            shown = done // _MEGABYTE

    return advance


def _write_beside(place: Place, plan: Plan, source: Path) -> None:
    """The JSON files and the copies, flushed."""
    with disk_errors(place.files):
        for name, text in plan.texts.items():
            (place.files / name).write_text(text, "utf-8")
        for path in plan.beside.copied:
            (place.files / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, place.files / path)
        for path in [*plan.texts, *plan.beside.copied]:
            sync(place.files / path)
