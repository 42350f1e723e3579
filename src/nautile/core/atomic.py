"""Files and folders that appear whole or not at all, whenever the process or the disk gives up.

Everything is written under a temporary sibling name, flushed to the disk, then renamed: a reader, or a run that
resumes after SIGKILL, sees the old state or the new one, never half of it. One gap remains: while a filled folder is
replaced, there is for a moment nothing at its path (`_put_in_place`).
"""

import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nautile.core.errors import DiskFullError, NautileError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors and torch.save report a full disk as their own exception types, with only text to go by.
_FULL_TEXT = re.compile("|".join(re.escape(os.strerror(code)) for code in _FULL))
_TORCH_TEXT = re.compile(r"PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write of `path` in this block into a `NautileError` that names it; let other errors through."""
    try:
        yield
    except OSError as error:
        if not _concerns(error, path):
            raise
        raise _write_error(path, error.strerror or str(error), error.errno in _FULL) from error
    except Exception as error:
        told = _FULL_TEXT.search(str(error))
        if not told and not _TORCH_TEXT.search(str(error)):
            raise
        raise _write_error(path, told[0] if told else "not all bytes could be written", full=True) from error


def _concerns(error: OSError, path: Path) -> bool:
    """False for a file elsewhere, such as an input that the block reads; a failed write carries no file name."""
    if error.errno in _FULL or error.filename is None:
        return True
    return Path(os.fsdecode(error.filename)).absolute().is_relative_to(path.absolute().parent)


def _write_error(path: Path, reason: str, full: bool) -> NautileError:
    why = f"{reason}; nothing that was there before has changed"
    if full:
        return DiskFullError(f"cannot write {path}", why, "free some space on that disk and run the same command again")
    return NautileError(f"cannot write {path}", why, "check or change that path")


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, or leave `path` as it was.

    Raises:
        NautileError: the disk is full or not writable.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        partial = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.chmod(0o644)  # mkstemp makes files that only the owner reads
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path` when the block ends well and vanishes when it does not.

    A folder that stands at `path` already is replaced, with a moment in which neither is there. What earlier, killed
    processes of this machine left behind for the same `path` is removed first.

    Raises:
        NautileError: the disk is full or not writable; `path` is as it was.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        partial = _sibling(path, "partial")
        partial.mkdir()
        try:
            yield partial
            for file in partial.rglob("*"):
                sync(file)
            sync(partial)
            _put_in_place(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(path.parent)


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename; a folder cannot be renamed over a filled one, so an older one steps aside first.

    Between the two renames a reader finds no folder at all. A process killed there leaves the older one under its
    temporary name, and the next writer of `path` puts it back.
    """
    if not path.exists():
        partial.rename(path)
        return
    old = _sibling(path, "old")
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.{kind}")


def _remove_leftovers(path: Path) -> None:
    ours = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(socket.gethostname())}-(\d+)\.(partial|old)")
    for sibling in path.parent.iterdir():
        found = ours.fullmatch(sibling.name)
        if found is None or (int(found[1]) != os.getpid() and _alive(int(found[1]))):
            continue
        if found[2] == "old" and not path.exists():  # killed between the two renames: the old one is still good
            sibling.rename(path)
        else:
            shutil.rmtree(sibling)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
