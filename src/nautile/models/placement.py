"""Which type and which device weights are loaded to, as people name them."""

from collections.abc import Mapping
from typing import Any

import torch

from nautile.core.errors import UserError
from nautile.core.nearest import suggestion

NAMES = {
    **dict.fromkeys(("fp32", "float32", "float"), torch.float32),
    **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
    **dict.fromkeys(("fp16", "float16", "half"), torch.float16),
    **dict.fromkeys(("fp64", "float64", "double"), torch.float64),
}
"""Names of the types that a model runs in, as flags, config.json, vLLM and transformers spell them."""


def torch_dtype(value: torch.dtype | str | None, published: Mapping[str, Any]) -> torch.dtype:
    """The type that `value` means: a type, a name of one, "auto" for the one that config.json names; None is float32.

    Args:
        value: What was asked for.
        published: The model's config.json.

    Raises:
        UserError: There is no such type, or a model cannot run in it.
    """
    if value is None:
        return torch.float32
    if isinstance(value, torch.dtype):
        if value in NAMES.values():
            return value
        raise _no_type(f"dtype {value}")
    if not isinstance(value, str):
        raise _no_type(f"dtype {value!r}")
    if value == "auto":
        said = str(published.get("torch_dtype") or published.get("dtype") or "float32")
        found = NAMES.get(_plain(said))
        if found is None:
            raise _no_type(f"config.json: torch_dtype {said}")
        return found
    found = NAMES.get(_plain(value))
    if found is None:
        names = ("fp32", "bf16", "fp16", "auto")
        raise UserError(f"dtype {value!r} is no type to run in", _WHY, suggestion(value, names, "types"))
    return found


def torch_device(value: torch.device | str) -> torch.device:
    """The device that `value` means.

    Raises:
        UserError: There is no such device here.
    """
    if not isinstance(value, str | torch.device):
        raise UserError(f"{value!r} is no device", "a device has a name", 'give "cpu", "cuda", "cuda:1", ...')
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    kind, _, index = str(value).partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind in kinds and (not index or (index.isdecimal() and int(index) < count)):
        return torch.device(value)
    raise UserError(
        f"there is no device {str(value)!r} here",
        f"PyTorch {torch.__version__} sees {', '.join(kinds)}" + (f", {count} of them" if kind in kinds[1:] else ""),
        "use the device cpu, or install a PyTorch that knows yours: nautile doctor",
    )


_WHY = "weights are numbers of 16, 32 or 64 bits with a fraction; smaller ones are widened as they are read"


def _plain(name: str) -> str:
    return name.removeprefix("torch.")


def _no_type(what: str) -> UserError:
    return UserError(f"{what} is no type to run in", _WHY, "choose fp32, bf16 or fp16")
