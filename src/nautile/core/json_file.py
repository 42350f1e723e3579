"""JSON files that came with a model: read as what they must be, or refused in words."""

import json
import re
from pathlib import Path
from typing import Any

from nautile.core.errors import UserError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json_object(path: Path, purpose: str, cure: str = "copy the file again") -> dict[str, Any]:
    """Fields of a JSON file that must hold one object.

    Args:
        path: The file, in UTF-8.
        purpose: Why it is read, as the sentence of a refusal: "the model's shape is read from it".
        cure: What to do about a file that cannot be read.

    Raises:
        UserError: It cannot be read, is not UTF-8, not JSON, names a key twice, or holds something other than an
            object.
    """
    try:
        fields = unique_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", purpose, cure) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})", purpose, cure) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not JSON (byte {error.start} is no UTF-8)", purpose, cure) from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})", purpose, cure) from error
    if isinstance(fields, dict):
        return fields
    raise UserError(f"{path} holds no JSON object", f"a {path.name} is one, and {purpose}", cure)


def unique_json(text: bytes) -> Any:
    """Parsed JSON whose objects name no key twice: of two entries, the usual parser silently takes the last.

    Raises:
        ValueError: It is not UTF-8, not JSON, holds half of a character (a lone surrogate, which no file can be written
            with), or names a key twice.
    """
    decoded = text.decode("utf-8")
    try:
        parsed = json.loads(decoded, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("brackets within brackets without end") from error
    if _SURROGATE.search(decoded):
        try:
            json.dumps(parsed, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text in it holds half of a character") from error
    return parsed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"{key!a:.100} is named twice")
            seen.add(key)
    return entries
