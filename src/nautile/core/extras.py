"""Optional libraries: imported in the function that needs them, with the install command where they are missing."""

import importlib
from types import ModuleType

from nautile.core.errors import UserError


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which the extra `extra` installs.

    Raises:
        UserError: it is not installed. An installed module that fails on its own imports raises as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"{module} is not installed",
            f"it is an optional library of the extra {extra!r}",
            f"python -m pip install 'nautile[{extra}]'",
        ) from None
