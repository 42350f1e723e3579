"""Stop strings in a text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string in a stream, and never lets go of text that may be the beginning of one.

    Args:
        strings: What ends the text; none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text; return what is now certain to stand before any stop string. Afterwards look at `found`."""
        if self.found is not None:
            return ""
        text = self.held + text
        hits = [(text.index(string), string) for string in self.strings if string in text]
        if hits:
            at, self.found = min(hits)
            self.held = ""
            return text[:at]
        certain = len(text) - self._may_begin(text)
        self.held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text held back, when nothing follows."""
        held, self.held = self.held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max((len(string) - 1 for string in self.strings), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self.strings):
                return length
        return 0
