"""The known name that a mistyped one most likely meant."""

import difflib
from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None if none is close.

    Case and the choice between ``-`` and ``_`` do not count as differences.
    """
    folded = {_fold(candidate): candidate for candidate in candidates}
    close = difflib.get_close_matches(_fold(name), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def suggestion(name: str, candidates: Iterable[str], kind: str) -> str:
    """The cure line of an unknown-name error: the nearest name, else all of them (`kind` is their plural noun)."""
    known = list(candidates)
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else f"the {kind} are: {', '.join(known)}"


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")
