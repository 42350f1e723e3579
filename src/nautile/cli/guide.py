"""``nautile guide [SYSTEM]``: each DeepSeek system, what of it stands here, where it lives and how to run it."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from nautile.cli.flags import parse
from nautile.cli.systems import SYSTEMS, System
from nautile.core.errors import UserError
from nautile.core.nearest import suggestion

EXAMPLES = ("nautile guide", "nautile guide mla")


@dataclass(frozen=True)
class GuideArgs:
    """What to show."""

    system: tyro.conf.Positional[str] = ""
    """A system or a mechanism, e.g. v3 or mla; without one, the index."""
    markdown: bool = False
    """Print the whole guide as the page docs/guide.md."""


def main(argv: Sequence[str]) -> None:
    """Print the index, one system, or the page."""
    description = "The DeepSeek systems: what each is, where it lives here, how to run it."
    args = parse(GuideArgs, None, argv, "nautile guide", description, EXAMPLES)
    if args.markdown:
        print(page(), end="")
    else:
        print(details(find(args.system)) if args.system else index())


def find(name: str) -> System:
    """The system that `name` means: its key, its published name, or an alias.

    Raises:
        UserError: none is called so.
    """
    names = {known.lower(): system for system in SYSTEMS for known in (system.key, system.name, *system.aliases)}
    if name.lower() in names:
        return names[name.lower()]
    keys = [system.key for system in SYSTEMS]
    known = [*keys, *(alias for system in SYSTEMS for alias in system.aliases)]
    cure = suggestion(name, known, "systems")
    raise UserError(
        f"unknown system {name!r}",
        "the guide has no entry for it",
        cure if cure.startswith("did") else f"the systems are: {', '.join(keys)}",
    )


def index() -> str:
    """One line per system: key, name, status."""
    rows = [f"  {system.key:<9} {system.name:<20} {system.status}" for system in SYSTEMS]
    return "\n".join([f"  {'':<9} {'system':<20} here today", *rows, "", "nautile guide SYSTEM shows one of them."])


def details(system: System) -> str:
    """Everything about one system, for a terminal."""
    lines = [f"{system.name} ({system.status})", "", textwrap.fill(system.about, 100), ""]
    lines += [_labelled(label, text) for label, text in _facts(system)]
    lines += [_labelled("paper", f"{title}, arXiv {arxiv}") for title, arxiv in system.papers]
    lines.append(_labelled("official", f"https://github.com/deepseek-ai/{system.repository}"))
    lines += [_labelled("code", f"src/nautile/{path}") for path in system.code]
    lines += [_labelled("run", command) for command in system.run]
    return "\n".join(lines)


def page() -> str:
    """docs/guide.md: the index as a table, then every system."""
    rows = [f"| [{system.name}](#{_anchor(system)}) | {system.status} | {_papers(system)} |" for system in SYSTEMS]
    head = [
        "# Guide to the systems",
        "",
        "Each DeepSeek system, what of it stands here today, where it lives and how to run it. The command",
        "`nautile guide` shows the same in a terminal; `nautile guide --markdown` writes this page.",
        "",
        "| system | here today | papers |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join([*head, *(_section(system) for system in SYSTEMS)]) + "\n"


def _section(system: System) -> str:
    facts = [f"- **{label.capitalize()}:** {text}." for label, text in _facts(system)]
    facts.append(f"- **Papers:** {'; '.join(f'*{title}*, {_link(arxiv)}' for title, arxiv in system.papers)}")
    facts.append(f"- **Official code:** <https://github.com/deepseek-ai/{system.repository}>")
    if system.code:
        facts.append(f"- **Code:** {', '.join(f'`src/nautile/{path}`' for path in system.code)}")
    if system.run:
        facts.append(f"- **Run:** {', '.join(f'`{command}`' for command in system.run)}")
    return "\n".join(["", f"## {system.name} {{#{_anchor(system)}}}", "", system.about, "", *facts])


def _facts(system: System) -> list[tuple[str, str]]:
    planned = f" (planned in {', '.join(system.planned)})" if system.missing and system.planned else ""
    facts = [("built", system.built), ("not yet", f"{system.missing}{planned}" if system.missing else "")]
    return [(label, text) for label, text in facts if text]


def _labelled(label: str, text: str) -> str:
    return textwrap.fill(text, 100, initial_indent=f"{label:<10}", subsequent_indent=" " * 10, break_on_hyphens=False)


def _papers(system: System) -> str:
    return ", ".join(_link(arxiv) for _, arxiv in system.papers)


def _link(arxiv: str) -> str:
    return f"[arXiv {arxiv}](https://arxiv.org/abs/{arxiv})"


def _anchor(system: System) -> str:
    return f"system-{system.key.replace('.', '-')}"
