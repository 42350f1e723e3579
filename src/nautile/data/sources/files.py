"""Your own text: plain files of any kind, JSON lines, parquet, and folders of them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from nautile.core.errors import UserError
from nautile.core.extras import require
from nautile.core.nearest import suggestion
from nautile.data.sources.document import Document, Skipped, decode_text, stat_line

READABLE = "text files in UTF-8, .jsonl and .parquet files, and folders of them"
_PARQUET_ROWS = 1024
_ARCHIVES = {".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z"}


class Files:
    """The files named, and all files of the folders named; hidden ones (``.git``) stay out, links are not followed.

    A plain file is one document; every line of a .jsonl and every row of a .parquet file is one.

    Args:
        paths: Existing files and folders.
        text_field: Key or column that holds the text in .jsonl and .parquet files.

    Raises:
        UserError: a file that was named itself is no text, .jsonl or .parquet.
    """

    def __init__(self, paths: tuple[str, ...], text_field: str) -> None:
        self._text_field = text_field
        self._files: list[tuple[str, Path]] = []
        for path in map(Path, paths):
            if path.is_dir():
                self._files += _inside(path)
            else:
                _check_readable(path)
                self._files.append((path.name, path))

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        """Every document, path after path in the order given, folders in the order of their names."""
        for name, path in self._files:
            try:
                yield from self._read(name, path, skipped)
            except OSError as error:
                skipped.add(name, f"unreadable: {error.strerror or error}")

    def inventory(self) -> list[str]:
        """Field, and path, size and time of every file."""
        stats = ((path.resolve(), path.stat()) for _, path in self._files)
        return [self._text_field, *(stat_line(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)]

    def _read(self, name: str, path: Path, skipped: Skipped) -> Iterator[Document]:
        if path.suffix == ".jsonl":
            yield from self._lines(name, path, skipped)
        elif path.suffix == ".parquet":
            yield from self._rows(name, path, skipped)
        else:
            text, reason = decode_text(path.read_bytes())
            if reason:
                skipped.add(name, reason)
            else:
                yield Document(name, text)

    def _lines(self, name: str, path: Path, skipped: Skipped) -> Iterator[Document]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError):
                    record = None
                if not isinstance(record, dict):
                    skipped.add(f"{name}:{number}", "not a JSON object in UTF-8")
                    continue
                if self._text_field not in record:
                    raise self._no_field(f"{name}:{number}", list(record))
                yield from _checked(f"{name}:{number}", record[self._text_field], skipped)

    def _rows(self, name: str, path: Path, skipped: Skipped) -> Iterator[Document]:
        parquet = require("pyarrow.parquet", "data")
        try:
            table = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:  # pyarrow's own errors are both
            skipped.add(name, f"not parquet: {str(error).splitlines()[0]}")
            return
        columns = table.schema_arrow.names
        if self._text_field not in columns:
            raise self._no_field(name, columns)
        row = 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[self._text_field]):
            for value in batch.column(0).to_pylist():
                yield from _checked(f"{name}:{row}", value, skipped)
                row += 1

    def _no_field(self, where: str, fields: list[str]) -> UserError:
        return UserError(
            f"{where} has no field {self._text_field!r}",
            "data.text_field names the field that holds the text",
            suggestion(self._text_field, fields, "fields there"),
        )


def _inside(folder: Path) -> list[tuple[str, Path]]:
    """(name to show, path) of every file in `folder` and below, sorted."""
    found = []
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "__pycache__"]
        found += [Path(parent) / name for name in files if not name.startswith(".")]
    paths = sorted(path for path in found if path.is_file())
    return [(path.relative_to(folder.parent).as_posix(), path) for path in paths]


def _check_readable(path: Path) -> None:
    """A plain file that someone named is meant to be read: say at once if it cannot be."""
    if path.suffix in {".jsonl", ".parquet"}:
        return
    try:
        reason = decode_text(path.read_bytes())[1]
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        cure = "unpack it first" if path.suffix in _ARCHIVES else "convert it first, or remove it from data.paths"
        raise UserError(f"{path} cannot be read: {reason}", f"this source reads {READABLE}", cure)


def _checked(name: str, value: object, skipped: Skipped) -> Iterator[Document]:
    """The document of a record's field, unless it is no text at all."""
    if not isinstance(value, str):
        skipped.add(name, "text field is not a string")
        return
    try:
        value.encode()
    except UnicodeEncodeError:
        skipped.add(name, "not Unicode (half of a surrogate pair)")
        return
    yield Document(name, value)
