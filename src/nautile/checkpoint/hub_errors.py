"""What huggingface_hub's exceptions mean to the person who asked for a model."""

import errno

from nautile.core.errors import DiskFullError, NautileError, UserError

LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token of yours"


def told(error: Exception, name: str) -> NautileError | None:
    """The sentence for `error`, raised while repository `name` was asked for; None if it is about something else."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name.partition('@')[0]}"
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, name, page)
    if isinstance(error, errors.HFValidationError):
        return UserError(
            f"{name} is no folder here and cannot be a name on the Hub",
            "a Hub id is organisation/name of letters, digits, '-', '_' and '.'",
            "check the spelling",
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return NautileError(
            f"{name} is not, or not wholly, in the cache at {constants.HF_HUB_CACHE}",
            "HF_HUB_OFFLINE is set, so it cannot be downloaded",
            "unset HF_HUB_OFFLINE, or name a local folder",
        )
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return DiskFullError(
            f"{name}: the disk of {constants.HF_HUB_CACHE} is full",
            "files that arrived whole are kept",
            "free some space or set HF_HOME to a larger disk, then run the same command again",
        )
    broken = (errors.HTTPError, ConnectionError, RuntimeError, errors.LocalEntryNotFoundError)
    if isinstance(error, broken) or "Consistency check failed" in str(error):
        return NautileError(
            f"{name} could not be downloaded ({_first_line(error)})",
            f"{constants.ENDPOINT} does not answer or the transfer broke; files that arrived whole are kept",
            "check the network and run the same command again: it goes on where it stopped",
        )
    return None


def _refused(error, name: str, page: str) -> NautileError:
    """The Hub answered, with a refusal. Repositories that do not exist and hidden ones get the same answer."""
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(
            f"{name}: no such revision",
            "the Hub has that repository, but no branch, tag or commit of that name",
            f"choose one at {page}/commits",
        )
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{name} is gated",
            "its authors ask you to accept their terms before you download it",
            f"accept them at {page}, then {LOG_IN}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{name} is no folder here, and the Hub shows no such repository",
            "it does not exist, or it is private and you are not logged in",
            f"check the spelling; for a private one {LOG_IN}",
        )
    if status in (401, 403):
        return UserError(
            f"{name}: the Hub refuses access ({status})",
            "it is private, or your token is missing, wrong or without the right to read it",
            LOG_IN,
        )
    if status == 429:
        return NautileError(
            f"{name}: the Hub asks for patience (429)",
            "too many requests came from this address",
            f"wait some minutes and run the same command again; to be allowed more, {LOG_IN}",
        )
    return NautileError(
        f"{name}: the Hub answered {status}",
        _first_line(error),
        "run the same command again later: it goes on where it stopped",
    )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
