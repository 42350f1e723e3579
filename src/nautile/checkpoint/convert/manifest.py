"""What an interrupted conversion leaves beside its finished files, so that the next one can tell whether to go on.

It goes on only with the same source (names, sizes, times of change, headers), the same options and the same plan; a
finished file counts only if its contents still have the checksum that was noted.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nautile.checkpoint.convert.files import CONFIG
from nautile.checkpoint.convert.options import Options
from nautile.checkpoint.convert.plan import Plan
from nautile.checkpoint.source import Checkpoint
from nautile.core.atomic import atomic_write_text
from nautile.core.errors import NautileError

FILE = "manifest.json"
VERSION = 1


@dataclass
class Manifest:
    """The work so far."""

    options: dict[str, Any]
    source: dict[str, dict[str, Any]]
    plan: str
    done: dict[str, str] = field(default_factory=dict)
    """Finished file → checksum of its contents."""
    version: int = VERSION

    @classmethod
    def begin(cls, checkpoint: Checkpoint, options: Options, plan: Plan) -> "Manifest":
        """That of work not begun."""
        return cls(asdict(options), identity(checkpoint), plan.digest())

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The one in `folder`; None if there is none that can be read."""
        try:
            return cls(**json.loads((folder / FILE).read_text("utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Put it into `folder`, replacing an earlier one whole."""
        atomic_write_text(folder / FILE, json.dumps(asdict(self), indent=1))

    def difference(self, other: "Manifest") -> str | None:
        """Why work noted in `other` cannot be continued as this; None if it can."""
        if self.version != other.version:
            return "another version of nautile began it"
        if self.options != other.options:
            return "it was begun with other options"
        if self.source != other.source:
            return "the source has changed since"
        if self.plan != other.plan:
            return "this version of nautile would write other files"
        return None


def identity(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """What tells one source from another: every file's size, time of change and, for safetensors, header.

    Raises:
        NautileError: A file is gone.
    """
    paths = sorted({*checkpoint.files.values(), checkpoint.folder / CONFIG})
    found = {}
    for path in paths:
        if path.name == CONFIG and not path.is_file():
            continue
        try:
            status = path.stat()
            head = _head(path)
        except OSError as error:
            raise NautileError(
                f"{path}: {error.strerror}", "it is being converted", "leave the source as it is, and start again"
            ) from error
        found[path.name] = {"bytes": status.st_size, "changed": status.st_mtime_ns, "head": head}
    return found


def _head(path: Path) -> str | None:
    """Checksum of a safetensors header, or of the whole config.json."""
    if path.name != CONFIG and path.suffix != ".safetensors":
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        length = os.fstat(handle).st_size
        if path.suffix == ".safetensors":
            length = min(length, 8 + int.from_bytes(os.pread(handle, 8, 0), "little"))
        return hashlib.sha256(os.pread(handle, length, 0)).hexdigest()
    finally:
        os.close(handle)
