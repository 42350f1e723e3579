"""JSON files that came with a model: read as what they must be, or refused in words."""

import json
from pathlib import Path
from typing import Any

from nautile.core.errors import UserError


def read_json_object(path: Path, purpose: str, cure: str = "copy the file again") -> dict[str, Any]:
    """Fields of a JSON file that must hold one object.

    Args:
        path: The file, in UTF-8.
        purpose: Why it is read, as the sentence of a refusal: "the model's shape is read from it".
        cure: What to do about a file that cannot be read.

    Raises:
        UserError: It is not UTF-8, not JSON, or holds something other than an object.
    """
    try:
        fields = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})", purpose, cure) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not JSON (byte {error.start} is no UTF-8)", purpose, cure) from error
    except RecursionError as error:
        raise UserError(f"{path}: not JSON (brackets within brackets without end)", purpose, cure) from error
    if isinstance(fields, dict):
        return fields
    raise UserError(f"{path} holds no JSON object", f"a {path.name} is one, and {purpose}", cure)
