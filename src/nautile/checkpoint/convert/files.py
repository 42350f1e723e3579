"""What lies beside the weights: which files are copied, and how config.json tells the new dtype."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nautile.checkpoint.fp8 import Fp8Format
from nautile.core.json_file import read_json_object

CONFIG = "config.json"
WEIGHTS = (
    "*.safetensors",
    "*.index.json",
    *(f"*.{ending}" for ending in ("bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx", "npz", "ot", "tflite")),
)
"""Weights and their indexes, in any format: made anew, or not of this conversion."""
SMALL_FOLDER = 100_000_000
"""Bytes up to which a subfolder (code, figures, an encoding) is copied."""
TOKENIZER = ("*token*", "chat_template*", "vocab.*", "merges.txt")
"""What DeepSeek's demo loads beside its weights."""


@dataclass
class Beside:
    """Files of the source that are not its weights, as paths below its folder."""

    copied: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Files of other weight formats, large subfolders, and what is no file: dangling links, pipes, sockets."""


def beside(folder: Path, used: set[str], only: tuple[str, ...] = ("*",)) -> Beside:
    """Sort what is beside the weights.

    Args:
        folder: The source.
        used: Names of the weight files that are converted.
        only: Patterns of the names that are wanted; subfolders are wanted where all names are.
    """
    found = Beside()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in used or path.name == CONFIG:
            continue
        if not (path.is_dir() or path.is_file()):
            found.left_out.append(path.name)
        elif path.is_dir():
            if only == ("*",):
                _sort_folder(folder, path, found)
        elif _is_weights(path.name):
            if not path.name.endswith(".index.json"):
                found.left_out.append(path.name)
        elif any(fnmatch(path.name, pattern) for pattern in only):
            found.copied.append(path.relative_to(folder))
    return found


def _sort_folder(folder: Path, path: Path, found: Beside) -> None:
    inside = sorted(path.rglob("*"))
    files = [file for file in inside if file.is_file()]
    if any(_is_weights(file.name) for file in files) or sum(f.stat().st_size for f in files) > SMALL_FOLDER:
        found.left_out.append(f"{path.name}/")
    else:
        found.copied += [file.relative_to(folder) for file in files]
        found.left_out += [str(odd.relative_to(folder)) for odd in inside if not (odd.is_file() or odd.is_dir())]


def _is_weights(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WEIGHTS)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, or nothing where there is none.

    Raises:
        UserError: It is not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        return {}
    return read_json_object(path, "it says how the weights are stored")


def converted_config(published: Mapping[str, Any], dtype: str, fmt: Fp8Format | None) -> dict[str, Any]:
    """config.json of the converted folder.

    Args:
        published: That of the source.
        dtype: Name of the dtype of what is not quantised, e.g. ``bfloat16``; put where the file, or a part of it for
            a language or vision model, spells ``torch_dtype`` or ``dtype``.
        fmt: How the weights are quantised now; None drops ``quantization_config``.
    """
    config = copy.deepcopy(dict(published))
    config.pop("quantization_config", None)
    if not ({"torch_dtype", "dtype"} & set(config)):
        config["torch_dtype"] = dtype
    _set_dtype(config, dtype)
    return config | ({"quantization_config": fmt.to_hf()} if fmt else {})


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key, value in config.items():
        if key in ("torch_dtype", "dtype") and (value is None or isinstance(value, str)):
            config[key] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)
