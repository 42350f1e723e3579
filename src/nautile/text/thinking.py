"""Reasoning and answer: where ``<think>`` and ``</think>`` divide what a model writes.

The template opens the reasoning (R1, V3.1 with thinking), or the model does, or nobody does because there is none; and
an answer that is cut off may never close it. All four are read here, whole or as they stream.
"""

from collections.abc import Iterable
from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Piece:
    """Some text, and which part of the turn it belongs to."""

    text: str
    """Never empty."""
    reasoning: bool = False
    """Thought, not said."""


def opened_by(prompt: str) -> bool:
    """Whether a prompt ends inside reasoning, so that the model goes on with it."""
    return prompt.rstrip().endswith(OPEN)


def drop_reasoning(text: str) -> str:
    """What is left of a past answer: everything behind the last ``</think>``, as R1's template has it."""
    return text.rpartition(CLOSE)[2]


class ThinkSplitter:
    """Divides a turn that arrives in pieces. However the stream is cut, the parts are the same.

    Space around the marks belongs to them: reasoning begins and ends with a visible character, and so does the
    beginning of the answer behind it. Text without marks is answer and passes unchanged.

    Args:
        inside: The prompt has opened the reasoning already.
    """

    def __init__(self, inside: bool = False) -> None:
        self._reasoning = inside
        self._held = ""
        self._beginning = True  # of the turn: here, and only here, <think> is a mark
        self._bare = inside  # nothing visible yet in this part, and space before it is not wanted

    def push(self, text: str) -> list[Piece]:
        """What is certain by now, in order."""
        return self._read(text, last=False)

    def flush(self) -> list[Piece]:
        """The rest, when nothing follows."""
        return self._read("", last=True)

    def _read(self, text: str, last: bool) -> list[Piece]:
        self._held += text
        if self._beginning and not self._opening(last):
            return []
        pieces = []
        if self._reasoning:
            pieces += self._thought(last)
        if not self._reasoning:
            pieces += self._said(last)
        return pieces

    def _opening(self, last: bool) -> bool:
        """Look for ``<think>`` at the beginning; False while more text must decide."""
        begun = self._held.lstrip()
        if not last and len(begun) < len(OPEN) and OPEN.startswith(begun):
            return False
        self._beginning = False
        if begun.startswith(OPEN):
            self._reasoning = self._bare = True
            self._held = begun[len(OPEN) :]
        return True

    def _thought(self, last: bool) -> list[Piece]:
        thought, mark, rest = self._held.partition(CLOSE)
        if mark:
            self._held = rest
            shown = self._visible(thought).rstrip()
            self._reasoning, self._bare = False, True
        else:
            # Space at the end may stand before the mark, and the end itself may be its beginning.
            certain = thought if last else thought[: len(thought) - _begun(thought, CLOSE)]
            shown = self._visible(certain).rstrip()
            self._held = "" if last else thought[len(certain.rstrip()) :]
        return [Piece(shown, reasoning=True)] if shown else []

    def _said(self, last: bool) -> list[Piece]:
        shown, self._held = self._visible(self._held), ""
        return [Piece(shown)] if shown else []

    def _visible(self, text: str) -> str:
        if self._bare:
            text = text.lstrip()
            self._bare = not text
        return text


def split_thinking(text: str, inside: bool = False) -> tuple[str, str]:
    """(reasoning, answer) of a whole turn; see `ThinkSplitter`."""
    splitter = ThinkSplitter(inside)
    return join([*splitter.push(text), *splitter.flush()])


def join(pieces: Iterable[Piece]) -> tuple[str, str]:
    """(reasoning, answer) that pieces make up."""
    reasoning, answer = [], []
    for piece in pieces:
        (reasoning if piece.reasoning else answer).append(piece.text)
    return "".join(reasoning), "".join(answer)


def _begun(text: str, mark: str) -> int:
    """Length of the longest end of `text` that may be the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
