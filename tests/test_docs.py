"""The documents name files, verbs, recipes and packages; these tests keep the names true."""

import configparser
import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from nautile.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "nautile"
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if path.name != "CHANGELOG.md")
WRITTEN_BY_RUNS = ("runs/", "benchmarks/results", "site/")


def named_paths(text: str) -> list[str]:
    """Paths in backticks: ``layers/rope.py``, ``tests/parity/``."""
    return [path for path in re.findall(r"`([\w./-]+)`", text) if "/" in path.strip("/") or path.endswith("/")]


def exists(path: str) -> bool:
    return any((base / path).exists() for base in (ROOT, PACKAGE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_paths_exist(document):
    names = [path for path in named_paths(document.read_text()) if not path.startswith(WRITTEN_BY_RUNS)]
    ours = [path for path in names if exists(path.split("/")[0])]  # the rest are other projects' files
    assert [path for path in ours if not exists(path)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_verbs_exist(document):
    typed = re.findall(r"(?:^|[`/ ])nautile ([a-z]+)\b", "\n".join(code_in(document.read_text())))
    assert sorted(set(typed) - VERBS.keys()) == []


def code_in(text: str) -> list[str]:
    """Lines of code blocks, and inline code outside of them."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`[^`\n]+`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [*(line for block in blocks for line in block.splitlines()), *inline]


def test_readme_lists_every_verb():
    table = "\n".join(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|"))
    assert sorted(verb for verb in VERBS if f"`nautile {verb}" not in table) == []


def test_every_verb_has_its_file():
    assert sorted(verb for verb in VERBS if not (PACKAGE / "cli" / f"{verb}.py").exists()) == []


def test_agents_is_short():
    assert len((ROOT / "AGENTS.md").read_text().splitlines()) < 80


def test_portable_rooms_forbid_every_dependency_but_three():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*declared["dependencies"], *declared["optional-dependencies"]["data"]]
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in wanted}
    modules = {
        module
        for module, distributions in packages_distributions().items()
        if {name.lower().replace("_", "-") for name in distributions} & names and not module.startswith("_")
    }
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    forbidden = set(contracts["importlinter:contract:portable"]["forbidden_modules"].split())
    assert modules - forbidden == {"torch", "numpy", "safetensors"} | (
        modules & {"functorch", "torchgen", "pylab", "mpl_toolkits"}
    )


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f" {page}\n" not in navigation] == []
