"""Frozen dataclasses from YAML and back, strictly: every key known, every value of its field's type.

Precedence is dataclass default < recipe < flag. A mistake is a `UserError` that says file, line and the nearest name.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from nautile.core.atomic import atomic_write_text
from nautile.core.errors import UserError
from nautile.core.nearest import nearest, suggestion
from nautile.core.typed import Mismatch, read_value
from nautile.core.yaml_marks import KeyPath, read_marked

__all__ = ["difference", "dump_yaml", "field_docs", "from_mapping", "load_yaml", "nearest", "to_mapping"]

T = TypeVar("T")
Presets = Mapping[str, Mapping[str, object]]
"""Dotted path of a section → name → the instance that ``preset: name`` stands for."""


def load_yaml(cls: type[T], path: Path, presets: Presets | None = None) -> T:
    """Read the dataclass `cls` from a YAML file.

    A section listed in `presets` may say ``preset: NAME``; its other keys then replace fields of that instance.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, missing or twice there, a value has another type.
    """
    marked = read_marked(path)
    reader = _Reader(marked.where, presets or {})
    if not isinstance(marked.data, Mapping):
        raise UserError(
            f"{path}:1: expected keys and values, got {type(marked.data).__name__}",
            f"{cls.__name__} is a mapping",
            "write one 'key: value' per line",
        )
    return reader.section(cls, marked.data, ())


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str = "config") -> T:
    """Read the dataclass `cls` from plain dicts, lists and scalars; `where` begins each error message.

    Raises:
        UserError: a key is unknown or missing, or a value has another type.
    """
    return _Reader(lambda _: where, {}).section(cls, mapping, ())


def to_mapping(config: object) -> dict[str, Any]:
    """`config` as plain dicts, lists and scalars, every field written out."""
    if not is_dataclass(config):
        raise TypeError(f"{type(config).__name__} is not a dataclass")
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def dump_yaml(config: object, path: Path) -> None:
    """Write `config` whole, so that `load_yaml` gives an equal one back."""
    import yaml

    atomic_write_text(path, yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True, width=120))


def difference(before: object, after: object) -> list[str]:
    """One line per field that differs, e.g. ``"train.steps: 40 → 60"``; empty when the two are equal."""
    old, new = _flatten(to_mapping(before)), _flatten(to_mapping(after))
    keys = [*old, *(key for key in new if key not in old)]
    return [
        f"{key}: {_show(old, key)} → {_show(new, key)}"
        for key in keys
        if (key in old) != (key in new) or old[key] != new[key]
    ]


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, fields of its bases included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            docs |= _own_field_docs(base)
    return docs


class _Reader:
    """Walks a mapping along a dataclass. `where` turns a key path into "recipe.yaml:12"."""

    def __init__(self, where: Callable[[KeyPath], str], presets: Presets) -> None:
        self.where, self.presets = where, presets

    def section(self, cls: type[T], mapping: Mapping[str, Any], path: KeyPath, base: object = None) -> T:
        """Read `cls`; a field without a key keeps its value in `base`, or else its default."""
        if "preset" in mapping and ".".join(map(str, path)) in self.presets:
            base = self._preset(str(mapping["preset"]), path)
            mapping = {key: value for key, value in mapping.items() if key != "preset"}
            cls = type(base)  # pyrefly: ignore
        known = {field.name: field for field in fields(cls)}  # pyrefly: ignore
        self._refuse_unknown(cls, mapping, known, path)
        hints = get_type_hints(cls)
        return cls(**{name: self._field(field, hints[name], mapping, path, base) for name, field in known.items()})

    def _field(self, field: Field, hint: Any, mapping: Mapping[str, Any], path: KeyPath, base: object) -> Any:
        default = getattr(base, field.name) if base is not None else _default(field)
        if field.name in mapping:
            return self._value(hint, mapping[field.name], (*path, field.name), default)
        if default is MISSING:
            raise UserError(
                f"{self.where(path)}: missing key {field.name!r}{_inside(path)}",
                "this field has no default",
                f"add '{field.name}: ...'",
            )
        return default

    def _value(self, hint: Any, value: Any, path: KeyPath, default: object) -> Any:
        def read_section(cls: type, mapping: Mapping[str, Any], inner: KeyPath) -> object:
            same = inner == path and type(default) is cls
            return self.section(cls, mapping, inner, base=default if same else None)

        try:
            return read_value(hint, value, path, read_section)
        except Mismatch as mismatch:
            name = ".".join(map(str, mismatch.path))
            raise UserError(
                f"{self.where(mismatch.path)}: {name} is {_as_written(mismatch.value)}",
                f"it must be {mismatch.expected}",
                mismatch.cure or f"write {mismatch.expected} there",
            ) from None

    def _preset(self, name: str, path: KeyPath) -> object:
        choices = self.presets[".".join(map(str, path))]
        if name not in choices:
            raise UserError(
                f"{self.where((*path, 'preset'))}: unknown preset {name!r}{_inside(path)}",
                f"there is no such base for {'.'.join(map(str, path))}",
                suggestion(name, choices, "presets"),
            )
        return choices[name]

    def _refuse_unknown(self, cls: type, mapping: Mapping[str, Any], known: Mapping[str, Field], path: KeyPath) -> None:
        for key in mapping:
            if key not in known:
                raise UserError(
                    f"{self.where((*path, str(key)))}: unknown key {key!r}{_inside(path)}",
                    f"{cls.__name__} has no such field",
                    suggestion(str(key), known, "keys here"),
                )


def _default(field: Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _inside(path: KeyPath) -> str:
    return f" in {'.'.join(map(str, path))}" if path else ""


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(flat: Mapping[str, Any], key: str) -> str:
    if key not in flat:
        return "(absent)"
    return _as_written(flat[key])


def _as_written(value: Any) -> str:
    """`value` as a recipe would spell it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _own_field_docs(cls: type) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    docs = {}
    for statement, below in pairwise(body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            docs[statement.target.id] = inspect.cleandoc(below.value.value)
    return docs
