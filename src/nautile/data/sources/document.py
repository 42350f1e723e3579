"""The nouns of every source."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

EXAMPLES = 20
"""Names kept per reason, so that a folder of a million pictures does not fill the report."""


@dataclass(frozen=True)
class Document:
    """One text, the unit that is held out, deduplicated and packed."""

    name: str
    """Where it comes from, for people; e.g. ``stdlib/json/decoder.py``."""
    text: str
    """What it says."""


@dataclass
class Skipped:
    """What a source had to leave out, by reason."""

    counts: dict[str, int] = field(default_factory=dict)
    """Reason → how many."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason → names of the first ones."""

    def add(self, name: str, reason: str) -> None:
        """Leave `name` out."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.examples.setdefault(reason, [])
        if len(names) < EXAMPLES:
            names.append(name)

    def describe(self) -> str:
        """One line: every reason with its count and some names; empty when nothing was left out."""
        parts = []
        for reason, count in self.counts.items():
            names = self.examples[reason][:3]
            parts.append(f"{count} {reason} ({', '.join(names)}{', …' if count > len(names) else ''})")
        return "; ".join(parts)


class Source(Protocol):
    """Texts in an order that is the same on every reading."""

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        """Every readable document; what cannot be read goes to `skipped`."""
        ...

    def inventory(self) -> list[str]:
        """Lines that change whenever the documents may have changed; made without reading them."""
        ...


def stat_line(name: str, size: int, modified_ns: int) -> str:
    """An inventory's line about one file."""
    return f"{name} {size} {modified_ns}"


def decode_text(content: bytes) -> tuple[str, str]:
    """(text, "") of a file's bytes, or ("", reason) if they are no UTF-8 text. A byte order mark is dropped."""
    if b"\0" in content[:8192]:
        return "", "binary"
    try:
        return content.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        return "", "not UTF-8"
