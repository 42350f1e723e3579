import re
from pathlib import Path

import pytest

import nautile
from nautile.cli import guide
from nautile.cli.main import VERBS, main
from nautile.cli.systems import SYSTEMS
from nautile.core.errors import UserError

ROOT = Path(__file__).parents[2]
SOURCE = Path(nautile.__file__).parent


def test_the_page_is_what_the_code_renders():
    page = (ROOT / "docs" / "guide.md").read_text("utf-8")
    assert page == guide.page(), "run: nautile guide --markdown > docs/guide.md"


def test_there_are_seventeen_systems_with_distinct_names():
    assert len(SYSTEMS) == 17
    names = [name.lower() for system in SYSTEMS for name in {system.key, system.name.lower(), *system.aliases}]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.key)
def test_an_entry_is_whole_and_true(system):
    assert all(re.fullmatch(r"\d{4}\.\d{5}", arxiv) for _, arxiv in system.papers)
    assert system.papers
    assert all((SOURCE / path).exists() for path in system.code), "an entry names code that is not there"
    assert bool(system.built) == bool(system.code) == bool(system.run)
    assert system.missing or system.status == "built"
    assert {command.split()[1] for command in system.run} <= set(VERBS)


def test_rooms_of_what_is_not_built_are_not_claimed():
    statuses = {system.key: system.status for system in SYSTEMS}
    assert statuses["engram"] == statuses["3fs"] == "not yet"
    assert statuses["v3"] == statuses["r1"] == "partly"  # FP8 training and RL are missing


def test_index_has_a_line_per_system(capsys):
    assert main(["guide"]) == 0
    out = capsys.readouterr().out
    for system in SYSTEMS:
        assert re.search(rf"^  {re.escape(system.key)} +{re.escape(system.name)} +{system.status}$", out, re.M)


@pytest.mark.parametrize("name", ["v2", "MLA", "DeepSeek-V2"])
def test_a_system_is_found_by_key_name_and_mechanism(name, capsys):
    assert main(["guide", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith("DeepSeek-V2 (partly)\n")
    assert "src/nautile/layers/attention/mla.py" in out
    assert "nautile plan" in out
    assert "arXiv" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("name", "cure"), [("flashmal", "did you mean 'flashmla'?"), ("qqq", "the systems are: moe, ")]
)
def test_an_unknown_system_names_the_nearest(name, cure):
    with pytest.raises(UserError) as caught:
        guide.find(name)
    assert caught.value.cure.startswith(cure)
