"""Ctrl-C and SIGTERM ask the loop to stop at the end of the step; asking twice stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from nautile.core.log import log


@dataclass
class StopRequest:
    """Whether someone asked to stop."""

    signal: int | None = None
    """Number of the signal that asked, or None."""

    @property
    def name(self) -> str | None:
        """Name of that signal, e.g. ``"SIGINT"``."""
        return None if self.signal is None else signal.Signals(self.signal).name

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block the first SIGINT or SIGTERM only sets the request; a second one has its ordinary effect."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python delivers signals to the main thread alone
        return

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log(f"{signal.Signals(number).name}: saving after this step; once more stops at once")

    try:
        for number in previous:
            signal.signal(number, ask)
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
