"""The corpus that is on every machine: Python's standard library and its language reference.

About 10 MB of real code, with the English of its comments and docstrings, and 0.5 MB of reference prose
(`pydoc_data.topics`, what ``help("assert")`` prints). It differs between Python versions, so figures measured on it
belong to one version.
"""

import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nautile.core.errors import UserError
from nautile.data.sources.document import Document, Skipped, decode_text, stat_line

_FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_TABLE_MARK = b"gencodec.py"  # character tables of encodings/: 1.2 MB of generated hexadecimal


class PythonLibrary:
    """The running interpreter's library: .py files without tests, installed packages and generated tables."""

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_paths()["stdlib"])
        self._files = sorted(_source_files(self._root))
        if not self._files:
            raise UserError(
                f"{self._root} holds no Python source",
                "this interpreter comes without the source of its library",
                "use your own text: --data.source files --data.paths FOLDER",
            )

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        """``stdlib/...`` in the order of their paths, then ``topics/...`` by name."""
        for name in self._files:
            content = (self._root / name).read_bytes()
            if _TABLE_MARK in content[:400]:
                continue
            text, reason = decode_text(content)
            if reason:
                skipped.add(f"stdlib/{name}", reason)
            else:
                yield Document(f"stdlib/{name}", text)
        yield from (Document(f"topics/{topic}", text) for topic, text in sorted(_topics().items()))

    def inventory(self) -> list[str]:
        """The interpreter's version, and size and time of every file."""
        stats = ((name, (self._root / name).stat()) for name in self._files)
        version = f"{platform.python_implementation()} {platform.python_version()}"
        return [version, *(stat_line(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]


def _source_files(root: Path) -> Iterator[str]:
    """Paths relative to `root`, with forward slashes."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _left_out(name)]
        inside = Path(folder).relative_to(root)
        for name in files:
            # _sysconfigdata describes the machine that built the interpreter; topics.py is given topic by topic.
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and inside / name != _TOPICS_FILE:
                yield (inside / name).as_posix()


_TOPICS_FILE = Path("pydoc_data/topics.py")


def _left_out(folder: str) -> bool:
    return folder in _FOREIGN_FOLDERS or folder in _TEST_FOLDERS or folder.startswith("config-")


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return {}
    return topics
