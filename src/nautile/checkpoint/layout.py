"""Where each parameter lies in a published folder: one table, played forward to load and backward to save.

A family lists, for every parameter of ours, the published tensors it is made of. Loading copies piece after piece into
place; saving cuts the same pieces out again. Nothing is concatenated in memory.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Place = tuple[int | slice, ...]


@dataclass(frozen=True)
class Piece:
    """One published tensor: its name and the part of our parameter that it fills (``()`` for all of it)."""

    published: str
    place: Place = ()


@dataclass(frozen=True)
class Rule:
    """Pieces of every parameter whose name matches `pattern` as a whole."""

    pattern: str
    pieces: Callable[[re.Match[str], Tensor], Iterable[Piece]]


@dataclass(frozen=True)
class Layout:
    """How a family's parameters lie in a published folder. Names no rule matches are the same on both sides."""

    rules: Sequence[Rule] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    """Published name → our parameter that it repeats: written on saving, not read on loading."""

    def pieces(self, name: str, parameter: Tensor) -> list[Piece]:
        """Published tensors that make up our parameter `name`."""
        for rule in self.rules:
            if match := re.fullmatch(rule.pattern, name):
                return list(rule.pieces(match, parameter))
        return [Piece(name)]
