"""Long documents in parts, for a corpus that has too few documents to hold some out."""

from collections.abc import Iterator

from nautile.data.sources.document import Document, Skipped, Source
from nautile.text.spans import spans


class Parts:
    """A source whose documents are cut at line ends into parts of at most `longest` characters."""

    def __init__(self, source: Source, longest: int) -> None:
        self._source, self._longest = source, longest

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        """Parts in order, each named after its document."""
        for document in self._source.documents(skipped):
            for number, text in enumerate(spans(document.text, self._longest)):
                yield Document(f"{document.name}#{number}", text)

    def inventory(self) -> list[str]:
        """That of the whole documents."""
        return self._source.inventory()
