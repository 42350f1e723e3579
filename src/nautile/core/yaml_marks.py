"""A YAML file together with the line on which each of its keys stands."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nautile.core.errors import UserError
from nautile.core.nearest import nearest

if TYPE_CHECKING:
    from yaml import Node

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of the file down."""

_DEEPEST = 32
"""Levels of nesting after which a file can only be a cycle of aliases."""


@dataclass(frozen=True)
class Marked:
    """Plain data and where it was written."""

    path: Path
    """The file."""
    data: Any
    """Dicts, lists and scalars; an empty file is an empty dict."""
    lines: Mapping[KeyPath, int]
    """Line of each key or list item, from 1."""

    def where(self, key: KeyPath) -> str:
        """``"recipe.yaml:12"`` for `key`, or for the nearest section above it that is written out."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines.get(key, 1)}"


def read_marked(path: Path) -> Marked:
    """Read one YAML document.

    Raises:
        UserError: the file is missing, not UTF-8, not YAML, or has a key twice in one section.
    """
    import yaml

    text = _read_text(path)
    lines: dict[KeyPath, int] = {}
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return Marked(path, {}, lines)
        _walk(node, (), lines, path)
        return Marked(path, loader.construct_document(node), lines)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(
            f"{path}:{line}: not valid YAML", error.problem or str(error), "check indentation and colons on that line"
        ) from error
    except yaml.YAMLError as error:  # a control character: no mark
        raise UserError(f"{path}: not valid YAML", str(error).splitlines()[0], "is this the right file?") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        beside = [str(path.with_name(p.name)) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = nearest(str(path), beside)
        cure = f"did you mean {near}?" if near else "check the path"
        raise UserError(f"{path}: no such file", "the recipe cannot be read", cure) from None
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not UTF-8"
        raise UserError(f"{path}: not UTF-8 text", why, "save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read", error.strerror or str(error), "name a readable YAML file") from error


def _walk(node: "Node", at: KeyPath, lines: dict[KeyPath, int], path: Path) -> None:
    """Record the line of every key below `node`."""
    import yaml

    if len(at) > _DEEPEST:
        line = node.start_mark.line + 1
        raise UserError(f"{path}:{line}: nested too deep", "an alias may contain itself", "write the values out")
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _walk(item, (*at, i), lines, path)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = (*at, key.value if isinstance(key.value, str) else "?")
        line = key.start_mark.line + 1
        if name in lines:
            raise UserError(
                f"{path}:{line}: key {name[-1]!r} is there twice",
                f"line {lines[name]} has it already, and only one value can count",
                "delete one of the two lines",
            )
        lines[name] = line
        _walk(value, name, lines, path)
