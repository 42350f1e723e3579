"""Where a conversion works until it is whole: a hidden folder beside its destination.

    .DST.partial/manifest.json    which files are finished
    .DST.partial/files/           becomes DST, in one rename, when all is written and checked

A process that was killed leaves it, and the same command goes on there.
"""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from nautile.core.atomic import disk_errors, sync
from nautile.core.errors import UserError
from nautile.core.folder_lock import locked_folder


class Place:
    """Destination and work folder of one conversion.

    Args:
        source: The folder that is read.
        destination: Where the result is to stand.

    Raises:
        UserError: There is something at `destination`, or it lies in the source.
    """

    def __init__(self, source: Path, destination: Path) -> None:
        self.destination = destination.resolve()
        self.work = self.destination.with_name(f".{self.destination.name}.partial")
        self.files = self.work / "files"
        self.renamed = (self.work / "manifest.json").is_file() and not self.files.exists() and _filled(self.destination)
        """Whether a process seems to have been killed after `finish` gave the result its name."""
        _check(source.resolve(), self.destination, self.renamed)

    @contextmanager
    def held(self) -> Generator[None]:
        """Make the work folder, and keep other processes out of it while the block runs.

        Raises:
            UserError: Another process works there, or it holds what is not ours.
            NautileError: It cannot be made.
        """
        with disk_errors(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in self.work.iterdir() if not path.name.startswith(".")}
        if names and "manifest.json" not in names:
            raise UserError(
                f"{self.work} holds files that no conversion left",
                "the work is done there, and it would be emptied",
                "remove it or choose another destination",
            )
        with locked_folder(
            self.work,
            f"another process is writing {self.work}",
            "two would mix their files",
            "wait until it ends, or choose another destination",
        ):
            yield

    def refuse(self) -> NoReturn:
        """Say that the destination is taken."""
        raise _taken(self.destination)

    def clear(self) -> None:
        """Remove all finished files."""
        with disk_errors(self.work):
            shutil.rmtree(self.files, ignore_errors=True)
            self.files.mkdir(exist_ok=True)

    def abandon(self) -> None:
        """Remove the work folder, where it holds nothing worth going on with."""
        shutil.rmtree(self.work, ignore_errors=True)

    def finish(self) -> None:
        """Give the result its name."""
        with disk_errors(self.destination):
            sync(self.files)
            self.files.rename(self.destination)  # over an empty folder, too
            sync(self.destination.parent)
        self.abandon()


def _filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _taken(destination: Path) -> UserError:
    return UserError(
        f"{destination} exists and is not empty",
        "a conversion does not mix its files with others",
        "name a folder that does not exist yet, or remove this one",
    )


def _check(source: Path, destination: Path, renamed: bool) -> None:
    if destination == source or destination.is_relative_to(source):
        raise UserError(
            f"{destination} is {'the source' if destination == source else 'inside the source'}",
            "the source stays as it is",
            "name a folder elsewhere",
        )
    if not destination.exists():
        return
    if not destination.is_dir():
        raise UserError(f"{destination} is a file", "the result is a folder", "name a folder that does not exist yet")
    if _filled(destination) and not renamed:
        raise _taken(destination)
    if destination.is_mount():
        raise UserError(
            f"{destination} is a mounted disk",
            "the finished folder is renamed, which its root cannot be",
            f"name a folder in it: {destination / 'model'}",
        )
