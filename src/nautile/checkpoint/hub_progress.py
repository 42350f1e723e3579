"""While files come from the Hub: what is announced, how far it is, and what Ctrl-C does."""

import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nautile.core.errors import DiskFullError
from nautile.core.log import PLAIN_EVERY, log
from nautile.core.sizes import size_text


@contextmanager
def announced(title: str, home: Path, commit: str, wanted: dict[str, int]) -> Iterator[threading.Event]:
    """Say what will be fetched, refuse what the disk cannot hold, and report progress while the block runs.

    Args:
        title: What messages call the repository.
        home: Its folder in the Hub's cache.
        commit: Full hash of the commit to fetch.
        wanted: File → bytes.

    Yields:
        An event that is set when the person does not even want the files under way any more.

    Raises:
        DiskFullError: The disk has less room than the files need; nothing has been downloaded.
    """
    missing = [name for name in wanted if not (home / "snapshots" / commit / name).exists()]
    dropped = threading.Event()
    if not missing:
        yield dropped
        return
    needed, free = sum(wanted[name] for name in missing), _free(home)
    if needed > free:
        raise DiskFullError(
            f"{title}: {len(missing)} files of {size_text(needed)} are to be downloaded to {home.parent}",
            f"that disk has {size_text(free)} left; nothing has been downloaded",
            "free some space, or set HF_HOME to a folder on a larger disk",
        )
    log(f"{title}: downloading {len(missing)} of {len(wanted)} files, {size_text(needed)}, to {home.parent}")
    with _gentle_interrupt(title, dropped), _lines(title, home / "blobs", needed):
        yield dropped


def bars(base: type[Any], dropped: threading.Event) -> type[Any]:
    """huggingface_hub's progress bar `base`, silent where there is no terminal, ending a transfer once `dropped`."""

    class Bar(base):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | ({} if sys.stderr.isatty() else {"disable": True}))

        def update(self, n: float | None = 1) -> Any:
            if dropped.is_set():
                raise KeyboardInterrupt
            return super().update(n)

    return Bar


@contextmanager
def _gentle_interrupt(title: str, dropped: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C wait for the files under way, gigabytes each, and the second one drop them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    presses = 0

    def pressed(*_: object) -> None:
        nonlocal presses
        presses += 1
        if presses == 2:  # transfers end themselves; interrupting the wait for them would leave their pieces behind
            dropped.set()
            return
        if presses == 1:
            log(f"{title}: finishing the files under way, which are kept; Ctrl-C again drops them")
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _lines(title: str, blobs: Path, needed: int) -> Iterator[None]:
    """A line now and then; on a terminal huggingface_hub draws its own bars instead."""
    if sys.stderr.isatty():
        yield
        return
    whole = threading.Event()
    reporter = threading.Thread(target=_report, args=(title, blobs, needed, whole), daemon=True)
    reporter.start()
    try:
        yield
    finally:
        whole.set()
        reporter.join()


def _report(title: str, blobs: Path, needed: int, whole: threading.Event) -> None:
    before, started = _bytes_in(blobs), time.monotonic()
    while not whole.wait(PLAIN_EVERY):
        done = _bytes_in(blobs) - before
        rate = done / (time.monotonic() - started)
        log(f"{title}: {size_text(done)} of {size_text(needed)}, {rate / 1e6:.1f} MB/s")


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.glob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # renamed meanwhile
            continue
    return total


def _free(folder: Path) -> int:
    """Bytes free where `folder` lies or will lie."""
    return shutil.disk_usage(next(part for part in (folder, *folder.parents) if part.exists())).free
