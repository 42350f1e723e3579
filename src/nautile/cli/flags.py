"""A verb's flags, read by tyro from its frozen dataclass of arguments, with mistakes told in our three lines."""

import contextlib
import io
import re
from collections.abc import Sequence
from itertools import groupby
from typing import TypeVar

from nautile.core.errors import UserError
from nautile.core.nearest import nearest

T = TypeVar("T")


def parse(
    cls: type[T],
    default: T | None,
    argv: Sequence[str],
    prog: str,
    description: str,
    examples: Sequence[str] = (),
) -> T:
    """Read `argv` into `cls`.

    Nested dataclasses become dotted flags (``--train.steps 40``), with ``-`` and ``_`` meaning the same. A field
    annotated ``tyro.conf.Positional[...]`` has no flag; ``Annotated[Recipe, tyro.conf.arg(name="")]`` drops the
    field's own name from the flags below it. Field docstrings are the help.

    Args:
        cls: frozen dataclass of arguments.
        default: instance whose values stand where `argv` is silent, e.g. one made from a recipe; None for the
            class's own defaults.
        argv: the words after the verb.
        prog: the command up to here, e.g. ``"nautile pretrain"``.
        description: what the verb does, shown by ``--help``.
        examples: commands shown by ``--help``.

    Raises:
        UserError: an unknown flag, a missing or a wrong value.
        SystemExit: with code 0, after ``--help``.
    """
    shown = description + "".join(["\n\nexamples:", *(f"\n  {example}" for example in examples)] if examples else [])
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            parsed, unknown = _tyro(cls, default, argv, prog, shown)
    except SystemExit as ended:
        if ended.code == 0:
            raise
        raise _wrong_value(told.getvalue(), prog) from None
    if unknown:
        raise _unknown(unknown[0], _known_flags(cls, default), prog)
    return parsed


def _tyro(cls: type[T], default: T | None, argv: Sequence[str], prog: str, description: str) -> tuple[T, list[str]]:
    import tyro

    return tyro.cli(
        cls,
        default=tyro.MISSING_NONPROP if default is None else default,
        args=list(argv),
        prog=prog,
        description=description,
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands,),  # an optional section is flags, not a subcommand
    )


def first_word(argv: Sequence[str]) -> str | None:
    """The leading positional argument, if the first word is one: a recipe must be read before its flags are known."""
    return argv[0] if argv and not argv[0].startswith("-") else None


def _known_flags(cls: type[T], default: T | None) -> list[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        _tyro(cls, default, ["--help"], "", "")
    return sorted(set(re.findall(r"--[a-z][\w.-]*", shown.getvalue())))


def _unknown(word: str, flags: Sequence[str], prog: str) -> UserError:
    if not word.startswith("-"):
        return UserError(f"{word!r} is one argument too many", f"{prog} has no place for it", f"{prog} --help")
    name = word.partition("=")[0]
    leaf = name.strip("-").replace("_", "-")
    near = next((flag for flag in flags if flag.rpartition(".")[2] == leaf), None) or nearest(name, flags)
    cure = f"did you mean {near}?" if near else f"{prog} --help lists the flags"
    return UserError(f"unknown flag {name}", f"{prog} has no such flag", cure)


def _wrong_value(box: str, prog: str) -> UserError:
    """What tyro says in its box (title, paragraph, rule, ...; drawn in Unicode or in ASCII), on one line."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    paragraphs = [list(part) for rule, part in groupby(lines, lambda line: set(line) <= set("─-╰╯")) if not rule]
    what = " ".join(paragraphs[0]).rstrip(".")
    return UserError(what, "the command line could not be read", f"{prog} --help shows each flag and its type")
