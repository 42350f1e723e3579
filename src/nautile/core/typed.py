"""One plain YAML or JSON value, read strictly as the type that a dataclass field is annotated with."""

import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from nautile.core.nearest import nearest
from nautile.core.yaml_marks import KeyPath

ReadSection = Callable[[type, Mapping[str, Any], KeyPath], object]
"""Reads a nested dataclass: (class, mapping, path) → instance."""

_NAMES = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    types.NoneType: "null",
}


class Mismatch(Exception):  # noqa: N818 - not an error for people: the caller adds file and line
    """A value of another type than its field's."""

    def __init__(self, path: KeyPath, value: object, expected: str, cure: str = "") -> None:
        super().__init__(path, value, expected)
        self.path, self.value, self.expected, self.cure = path, value, expected, cure


def read_value(hint: Any, value: Any, path: KeyPath, read_section: ReadSection) -> Any:
    """`value` as `hint`, which may be a scalar type, Literal, Optional, tuple, list, dict, dataclass or Any.

    Of a union of dataclasses it is the first that has all the keys, or else, for what is wrong with them, the first.

    Integers pass for floats, as does text like ``1e-3`` (PyYAML follows YAML 1.1, where that is no number).
    Booleans never pass for numbers.

    Raises:
        Mismatch: it is something else.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return read_value(arguments[0], value, path, read_section)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, path, read_section)
    if origin is Literal:
        return _read_literal(arguments, value, path)
    if origin in (tuple, list):
        return _read_sequence(hint, value, path, read_section)
    if origin is dict:
        return _read_dict(arguments[1], value, path, read_section)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise Mismatch(path, value, "a section", "write its keys below it, indented")
        return read_section(hint, value, path)
    return _read_scalar(hint, value, path)


def describe_type(hint: Any) -> str:
    """`hint` in words, for an error message."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe_type(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, list):
        return "a list"
    if origin is dict or is_dataclass(hint):
        return "a section"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _read_scalar(hint: Any, value: Any, path: KeyPath) -> Any:
    if hint is float:
        return _read_float(value, path)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (int, str, bool, types.NoneType) and type(value) is hint:
        return value
    quote = "put it in quotes" if hint is str and isinstance(value, bool | int | float) else ""
    raise Mismatch(path, value, describe_type(hint), quote)


def _read_float(value: Any, path: KeyPath) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    raise Mismatch(path, value, "a number")


def _read_literal(choices: tuple[Any, ...], value: Any, path: KeyPath) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    near = nearest(value, map(str, choices)) if isinstance(value, str) else None
    raise Mismatch(path, value, "one of " + ", ".join(map(str, choices)), f"did you mean {near!r}?" if near else "")


def _read_union(options: tuple[Any, ...], value: Any, path: KeyPath, read_section: ReadSection) -> Any:
    if isinstance(value, Mapping):
        sections = [option for option in options if is_dataclass(option)]
        if sections:  # so that a mistake inside is reported as such, not as "none of these types"
            fitting = (s for s in sections if set(value) <= {field.name for field in fields(s)})
            return read_value(next(fitting, sections[0]), value, path, read_section)
    for option in options:
        try:
            return read_value(option, value, path, read_section)
        except Mismatch:
            continue
    raise Mismatch(path, value, " or ".join(describe_type(option) for option in options))


def _read_sequence(hint: Any, value: Any, path: KeyPath, read_section: ReadSection) -> Any:
    if not isinstance(value, list | tuple):
        raise Mismatch(path, value, "a list", f"write [{value}]" if isinstance(value, str | int | float) else "")
    kind, items = get_origin(hint), get_args(hint)
    if kind is list or items[1:] == (Ellipsis,):
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise Mismatch(path, value, f"a list of {len(items)}")
    pairs = enumerate(zip(items, value, strict=True))
    return kind([read_value(item, one, (*path, i), read_section) for i, (item, one) in pairs])


def _read_dict(item: Any, value: Any, path: KeyPath, read_section: ReadSection) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Mismatch(path, value, "a section", "write its keys below it, indented")
    return {str(key): read_value(item, one, (*path, key), read_section) for key, one in value.items()}
