"""One process at a time in a folder: a lock that the kernel drops when the process ends, however it ends."""

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from nautile.core.atomic import disk_errors
from nautile.core.errors import UserError
from nautile.core.log import warn

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


@contextmanager
def locked_folder(folder: Path, what: str, why: str, cure: str) -> Generator[None]:
    """Keep other processes out of `folder` (flock on its file ``.lock``) while the block runs.

    There is no such lock on Windows, nor on a network file system that offers none, which is said.

    Args:
        folder: It exists.
        what: The refusal's sentence, where another process holds the lock; so are `why` and `cure`.

    Raises:
        UserError: Another process holds it.
        NautileError: The folder is not writable.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    path = folder / ".lock"
    with disk_errors(path):
        file = path.open("ab")  # network file systems lock only what is open for writing
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(what, why, cure) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warn(f"{folder}: {error.strerror}; nothing keeps a second process out of this folder")
        yield
