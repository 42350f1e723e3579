"""What a person reads while the library works: plain lines into a pipe or a file, bars on a terminal.

Everything here goes to stderr, so that a command's result on stdout can be piped.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_EVERY = 5.0
"""Seconds between two progress lines where no bar can be drawn."""


def log(message: str) -> None:
    """Say one thing."""
    _say(message)


def warn(message: str) -> None:
    """Say one thing that the reader should not overlook."""
    _say(f"warning: {message}", style="yellow")


class Progress(Protocol):
    """How far a long piece of work has come."""

    def advance(self, steps: int = 1, text: str = "") -> None:
        """Count `steps` more as done; `text` is what to show beside them, e.g. ``"loss 3.2"``."""
        ...


@contextmanager
def progress(title: str, total: int, start: int = 0) -> Iterator[Progress]:
    """Show how `total` steps go by, of which `start` are done: a bar on a terminal, else a line now and then."""
    if not _terminal():
        plain = _PlainProgress(title, total, start)
        try:
            yield plain
        finally:
            plain.finish()
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[text]}"),
    )
    with rich_progress.Progress(*columns, console=_console()) as bars:
        yield _Bar(bars, bars.add_task(title, total=total, completed=start, text=""))


class _PlainProgress:
    def __init__(self, title: str, total: int, start: int) -> None:
        self.title, self.total, self.done, self.text = title, total, start, ""
        self.shown, self.shown_at = start, time.monotonic()

    def advance(self, steps: int = 1, text: str = "") -> None:
        self.done += steps
        self.text = text or self.text
        if time.monotonic() - self.shown_at >= PLAIN_EVERY:
            self._show()

    def finish(self) -> None:
        if self.shown != self.done:
            self._show()

    def _show(self) -> None:
        self.shown, self.shown_at = self.done, time.monotonic()
        log(f"{self.title} {self.done}/{self.total}  {self.text}".rstrip())


class _Bar:
    def __init__(self, bars, task) -> None:
        self.bars, self.task = bars, task

    def advance(self, steps: int = 1, text: str = "") -> None:
        fields = {"text": text} if text else {}
        self.bars.update(self.task, advance=steps, **fields)


def _say(message: str, style: str | None = None) -> None:
    if _terminal():
        _console().print(message, style=style, markup=False, highlight=False, soft_wrap=True)
    else:
        print(message, file=sys.stderr, flush=True)


def _terminal() -> bool:
    return sys.stderr.isatty()


@cache
def _console() -> "Console":
    from rich.console import Console

    return Console(stderr=True)
