"""What the word MODEL names: a folder here, or a repository of the Hugging Face Hub, which is downloaded first.

`huggingface_hub` does the transfer and keeps its own cache (``HF_HOME``): files that lie there are used again, a
transfer that breaks goes on from the byte where it broke, and a download that was stopped goes on with the files that
are not whole yet. It is imported only when a word is no path.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from nautile.checkpoint.hub_errors import told
from nautile.checkpoint.hub_progress import announced, bars
from nautile.core.errors import UserError
from nautile.core.log import warn
from nautile.core.nearest import suggestion

TEXTS = ("*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")
"""Configuration, tokenizer and chat template. Python files are never fetched, let alone run."""
SAFE = ("*.safetensors",)
PICKLED = ("*.bin",)
IN_FOLDERS = ("*/*",)
"""Subfolders hold other formats and examples: they are left out."""
LISTING_TIMEOUT = 20.0
"""Seconds to wait for the list of files before the cache is taken instead."""

REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Remote:
    """A repository of the Hub at one revision."""

    id: str
    """``organisation/name``."""
    revision: str | None = None
    """Branch, tag or commit; None for the default branch."""

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


def resolve(
    path_or_id: str | Path, *, weights: bool = True, revision: str | None = None, allow_pickle: bool = False
) -> Path:
    """The local folder of a model: `path_or_id` itself, or where the Hub's repository of that name was downloaded to.

    Args:
        path_or_id: A folder, its config.json, or ``organisation/name`` with an optional ``@revision``. A `Path` is
            always local.
        weights: Fetch the weights, too, not just configuration and tokenizer.
        revision: Branch, tag or commit of a Hub repository.
        allow_pickle: Fetch pickled ``.bin`` weights where there are no safetensors.

    Raises:
        UserError: There is no such folder or repository, no permission, or only pickled weights.
        NautileError: The Hub cannot be reached and the files are not cached, or the disk is full.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.is_file():
        return _folder_of(path)
    remote = remote_name(path_or_id, revision)
    if remote is None:
        raise _no_such_folder(path)
    return download(remote, weights=weights, allow_pickle=allow_pickle)


def remote_name(word: str | Path, revision: str | None = None) -> Remote | None:
    """The Hub repository that `word` names, or None if it can only be a path.

    A word whose first part is a folder here (``runs/demo``) is a path, so a mistyped run is not sought in the network.
    """
    match = REPOSITORY.fullmatch(word) if isinstance(word, str) else None
    if match is None or Path(match["id"].partition("/")[0]).is_dir():
        return None
    return Remote(match["id"], revision or match["revision"])


def download(remote: Remote, *, weights: bool = True, allow_pickle: bool = False) -> Path:
    """Fetch what is missing of `remote` into the Hub's cache, and return its folder there.

    The repository is listed first, so that a disk without room is known before the first byte. When it cannot be
    listed (no network, no permission any more), a whole cached copy serves.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError
    from huggingface_hub.utils import tqdm

    patterns = [*TEXTS, *(SAFE if weights else ())]
    try:
        try:
            listed = HfApi().model_info(
                remote.id, revision=remote.revision, files_metadata=True, timeout=LISTING_TIMEOUT
            )
        except RevisionNotFoundError:
            raise
        except (HTTPError, OSError) as unreachable:
            return _cached(remote, patterns, weights, allow_pickle, unreachable)
        sizes = {file.rfilename: file.size or 0 for file in listed.siblings or []}
        if weights and not _any(sizes, SAFE) and _any(sizes, PICKLED):
            if not allow_pickle:
                raise _only_pickled(remote)
            patterns += PICKLED
        wanted = {name: size for name, size in sizes.items() if _matches(name, patterns)}
        home = Path(constants.HF_HUB_CACHE) / f"models--{remote.id.replace('/', '--')}"
        with announced(str(remote), home, listed.sha or "", wanted) as dropped:
            folder = snapshot_download(
                remote.id,
                revision=remote.revision,
                allow_patterns=patterns,
                ignore_patterns=list(IN_FOLDERS),
                tqdm_class=bars(tqdm, dropped),
            )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: how hf_xet fails
        if sentence := told(error, str(remote)):
            raise sentence from error
        raise
    return Path(folder)


def _cached(remote: Remote, patterns: Sequence[str], weights: bool, allow_pickle: bool, why: Exception) -> Path:
    """The copy in the Hub's cache, if it is whole; `why` is raised as a sentence otherwise."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                remote.id,
                revision=remote.revision,
                allow_patterns=[*patterns, *(PICKLED if allow_pickle else ())],
                ignore_patterns=list(IN_FOLDERS),
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        raise told(why, str(remote)) or why from why
    names = [file.name for file in folder.iterdir()]
    if weights and not _any(names, SAFE) and not (allow_pickle and _any(names, PICKLED)):
        raise told(why, str(remote)) or why from why
    warn(f"{remote}: the Hub cannot be asked ({type(why).__name__}); using the copy in {folder}")
    return folder


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)


def _any(names: Sequence[str] | dict[str, int], patterns: Sequence[str]) -> bool:
    return any(_matches(name, patterns) for name in names)


def _folder_of(file: Path) -> Path:
    if file.name == "config.json":
        return file.parent
    raise UserError(
        f"{file}: a file, not a folder",
        "a model is a folder: config.json, weights and tokenizer lie in it together",
        f"name its folder: {file.parent}",
    )


def _no_such_folder(path: Path) -> UserError:
    siblings = [str(path.parent / found.name) for found in path.parent.glob("*") if found.is_dir()]
    cure = "name a folder with config.json and safetensors, or a Hub id such as deepseek-ai/DeepSeek-V2-Lite"
    return UserError(
        f"{path}: no such folder",
        "a model is a folder, a finished run, or organisation/name on the Hugging Face Hub",
        near if (near := suggestion(str(path), siblings, "")).startswith("did you mean") else cure,
    )


def _only_pickled(remote: Remote) -> UserError:
    return UserError(
        f"{remote} holds its weights only as pickled .bin files",
        "unpickling can run code, so nautile reads safetensors unless told otherwise; nothing has been downloaded",
        "if you trust its authors, give --allow-pickle (allow_pickle=True); weights alone are then unpickled",
    )
