"""Where each parameter lies in a published folder: one table, played forward to load and backward to save.

For every parameter of ours a family's layout gives the published tensors it is made of. Loading copies piece after
piece into place; saving cuts the same pieces out again. Nothing is concatenated in memory. Block-quantised tensors are
dequantised by whoever reads them (`nautile.checkpoint.source`), so a layout names weights only, never their scales.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

Place = tuple[int | slice, ...]


@dataclass(frozen=True)
class Piece:
    """One published tensor: its name and the part of our parameter that it fills (``()`` for all of it)."""

    published: str
    place: Place = ()


@dataclass(frozen=True)
class Rename:
    """Our name → published name, for names that match `pattern` as a whole."""

    pattern: str
    published: Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class Split:
    """Pieces of a parameter whose published name matches `pattern` as a whole: one of ours, several in the files."""

    pattern: str
    pieces: Callable[[re.Match[str], Tensor], Iterable[Piece]]


@dataclass(frozen=True)
class Drop:
    """Published tensors that are not read, and why."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Layout:
    """How a family's parameters lie in a published folder. Names no rule matches are the same on both sides."""

    renames: Sequence[Rename] = ()
    splits: Sequence[Split] = ()
    drops: Sequence[Drop] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    """Published name → our parameter that it repeats: written on saving, not read on loading."""

    def pieces(self, name: str, parameter: Tensor) -> list[Piece]:
        """Published tensors that make up our parameter `name`."""
        published = self.published(name)
        for rule in self.splits:
            if match := re.fullmatch(rule.pattern, published):
                return list(rule.pieces(match, parameter))
        return [Piece(published)]

    def published(self, name: str) -> str:
        """Name of our parameter `name` in the files, before it is split."""
        for rule in self.renames:
            if match := re.fullmatch(rule.pattern, name):
                return rule.published(match)
        return name

    def drop_reason(self, published: str) -> str | None:
        """Why this published tensor is not read; None if it should be."""
        if published in self.copies:
            return f"a copy of {self.copies[published]}"
        return next((rule.reason for rule in self.drops if re.fullmatch(rule.pattern, published)), None)


ROTARY = Drop(r".*\.rotary_emb\.inv_freq", "rotary frequencies are computed from config.json")
"""Some derivatives ship their rotary frequencies."""


def stacked_experts(first: int = 0) -> list[Split]:
    """Routed experts: stacked in two parameters here, three tensors per expert in the files.

    Args:
        first: Published index of the first expert held here; that of a rank's slice.
    """

    def gate_up(match: re.Match[str], parameter: Tensor) -> Iterable[Piece]:
        E, width, _ = parameter.shape
        for e in range(E):
            yield Piece(f"{match[1]}.{first + e}.gate_proj.weight", (e, slice(0, width // 2)))
            yield Piece(f"{match[1]}.{first + e}.up_proj.weight", (e, slice(width // 2, width)))

    def down(match: re.Match[str], parameter: Tensor) -> Iterable[Piece]:
        for e in range(parameter.shape[0]):
            yield Piece(f"{match[1]}.{first + e}.down_proj.weight", (e,))

    return [Split(r"(.+\.experts)\.gate_up_proj", gate_up), Split(r"(.+\.experts)\.down_proj", down)]


def only_local_experts(layout: Layout, local: range) -> Layout:
    """The layout of a process that holds the experts `local` of each layer: the others are dropped on purpose."""

    index = "|".join(map(str, local))
    others = Drop(
        rf".+\.mlp\.experts\.(?!(?:{index})\.)\d+\..+", f"this process holds experts {local.start}-{local.stop - 1}"
    )
    splits = [rule for rule in layout.splits if ".experts)" not in rule.pattern]
    return replace(layout, splits=[*splits, *stacked_experts(local.start)], drops=[*layout.drops, others])


def relocated_mtp(layers: int, modules: int) -> tuple[list[Rename], dict[str, str]]:
    """MTP module k is ``mtp.k.*`` here and ``model.layers.{layers + k}.*`` in the files.

    There its block's tensors stand beside its norms, and embedding and output head are stored again.

    Returns:
        Renames, and the copies.
    """

    def published(match: re.Match[str]) -> str:
        return f"model.layers.{layers + int(match[1])}.{match[2]}"

    copies = {}
    for layer in range(layers, layers + modules):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return [Rename(r"mtp\.(\d+)\.(?:block\.)?(.+)", published)], copies
