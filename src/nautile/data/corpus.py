"""Which documents of a source are used, once each, and on which side of the split they fall.

Only the content of a document decides its side: a hash of its text, read as a number in [0, 1), is compared with the
validation fraction. So equal texts, which are counted and used once, can never be on both sides, and a document stays
where it is when the corpus grows. The exceptions are the documents with the smallest and the largest hash: they are
held out and trained on whatever the fraction says, so that neither side is empty. In a corpus of few documents this can
differ from what the fraction says, and they can change sides when a more extreme one arrives.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from nautile.core.errors import UserError
from nautile.core.log import log
from nautile.data.config import DataConfig
from nautile.data.sources.document import Document, Skipped, Source
from nautile.data.sources.files import Files
from nautile.data.sources.parts import Parts
from nautile.data.sources.python_library import PythonLibrary
from nautile.text.spans import spans

_PARTS = 200
_SHORTEST_PART, _LONGEST_PART = 2_000, 64_000

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A document that is used."""

    document: Document
    """Its name and text."""
    digest: bytes
    """Hash of the text."""

    @property
    def position(self) -> float:
        """The hash as a number in [0, 1)."""
        return int.from_bytes(self.digest[:6], "big") / 2**48

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.document.text.encode())


@dataclass
class Survey:
    """What one reading of a corpus found."""

    documents: int = 0
    """Documents that are used."""
    num_bytes: int = 0
    """Their UTF-8 bytes."""
    duplicates: int = 0
    """Documents whose text had come before."""
    empty: int = 0
    """Documents of white space only."""
    lowest: float = 1.0
    """Smallest position of a used document."""
    highest: float = 0.0
    """Largest one."""
    skipped: Skipped = field(default_factory=Skipped)
    """What could not be read."""

    def count(self, entry: Entry) -> None:
        """Count a document as used."""
        self.documents += 1
        self.num_bytes += entry.num_bytes
        self.lowest, self.highest = min(self.lowest, entry.position), max(self.highest, entry.position)


class Corpus:
    """The documents of `source` that `config` asks for, read anew on every iteration, always in the same order.

    Raises:
        UserError: there are no two documents, so nothing could be held out.
    """

    def __init__(self, config: DataConfig, source: Source) -> None:
        self._fraction = config.validation_fraction
        self._source = source
        self._share = 1.0
        self.survey = self._read_through()
        """What is used."""
        if config.max_megabytes is not None and self.survey.num_bytes > config.max_megabytes * 1e6:
            self._share = config.max_megabytes * 1e6 / self.survey.num_bytes
            self.survey = self._read_through()
        if 0 < self.survey.documents * self._fraction < 1:
            self._cut_into_parts()
        if self.survey.documents < 2:
            raise _too_small(self.survey)

    def __iter__(self) -> Iterator[Entry]:
        return self._entries(Survey())

    def holds_out(self, entry: Entry) -> bool:
        """Whether a document belongs to validation; both sides always have at least one."""
        if entry.position in (self.survey.lowest, self.survey.highest):
            return entry.position == self.survey.lowest
        return entry.position < self._fraction

    def training_texts(self, megabytes: float) -> Iterator[str]:
        """About `megabytes` of the training documents, drawn evenly, for a tokenizer to learn from."""
        blocks = (
            block for entry in self if not self.holds_out(entry) for block in spans(entry.document.text, _LONGEST_PART)
        )
        return thin(blocks, megabytes * 1e6 / self.survey.num_bytes)

    def _entries(self, tally: Survey) -> Iterator[Entry]:
        return thin(_unique(self._source.documents(tally.skipped), tally), self._share)

    def _read_through(self) -> Survey:
        tally = Survey()
        for entry in self._entries(tally):
            tally.count(entry)
        return tally

    def _cut_into_parts(self) -> None:
        """Too few documents for a share of them to be one: hold out parts of documents instead."""
        whole = self.survey
        longest = min(max(whole.num_bytes // _PARTS, _SHORTEST_PART), _LONGEST_PART)
        self._source = Parts(self._source, longest)
        self.survey = self._read_through()
        log(
            f"data: {whole.documents} documents are too few to hold out {self._fraction:.1%} of them, so they are cut "
            f"into {self.survey.documents} parts of at most {longest} characters"
        )


def open_source(config: DataConfig) -> Source:
    """The source that `config` names."""
    if config.source == "python":
        return PythonLibrary()
    return Files(config.paths, config.text_field)


def thin(items: Iterable[T], share: float) -> Iterator[T]:
    """Every (1 / `share`)-th item, the first one included: an even draw that needs no chance and favours no size."""
    taken = 0
    for passed, item in enumerate(items, start=1):
        if taken < share * passed:
            taken += 1
            yield item


def _unique(documents: Iterable[Document], tally: Survey) -> Iterator[Entry]:
    """Documents with text, each text once; memory grows by one hash per document."""
    seen: set[bytes] = set()
    for document in documents:
        if not document.text.strip():
            tally.empty += 1
            continue
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if digest in seen:
            tally.duplicates += 1
            continue
        seen.add(digest)
        yield Entry(document, digest)


def _too_small(survey: Survey) -> UserError:
    left_out = survey.skipped.describe()
    found = "one short document" if survey.documents else "no text"
    return UserError(
        f"the corpus holds {found}",
        f"training and validation need a document each{f'; left out: {left_out}' if left_out else ''}",
        "give more text: --data.paths FILES_AND_FOLDERS",
    )
