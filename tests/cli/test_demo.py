"""``nautile demo``: what it decides and refuses. `.ci/run` runs the whole of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from nautile.cli import demo
from nautile.core.config import dump_yaml
from nautile.core.errors import UserError
from nautile.train.budget import steps_within
from nautile.train.recipe import load_recipe


class HeldOut:
    """Stands for a prepared corpus with these held-out documents."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def read_validation_texts(self, n: int) -> list[tuple[str, str]]:
        return [(f"document {i}", text) for i, text in enumerate(self.texts[:n])]


def test_steps_fit_the_time_and_the_limits() -> None:
    assert steps_within(170, 0.3, least=40, most=4000) == 560
    assert steps_within(170, 30, least=40, most=4000) == 40
    assert steps_within(1e6, 0.1, least=40, most=4000) == 4000


def test_the_hole_is_one_line_of_a_held_out_document() -> None:
    lines = [f"    value_{i} = {i}\n" for i in range(8)]
    text = "".join(lines) + "    return value_1 + value_2\n" + "".join(lines)
    name, prefix, middle, suffix = demo.find_hole(HeldOut("too short\n", text))
    assert name == "document 1"
    assert middle == "return value_1 + value_2"
    assert prefix + middle + suffix in text
    assert prefix.endswith("\n    ")
    assert demo.find_hole(HeldOut("nothing here\n")) is None


def test_a_demo_over_other_text_is_not_mixed_up(tmp_path: Path) -> None:
    recorded = replace(load_recipe("v3-micro"), name="demo")
    (tmp_path / "run").mkdir()
    dump_yaml(recorded, tmp_path / "run" / "config.yaml")
    same = demo.recorded(demo.Arguments(out=tmp_path / "run"))
    assert same == recorded
    with pytest.raises(UserError, match="other text"):
        demo.recorded(demo.Arguments(out=tmp_path / "run", text=(tmp_path,)))


def test_time_must_be_given() -> None:
    with pytest.raises(UserError, match="--seconds 0"):
        demo.run(demo.Arguments(seconds=0))


def test_own_text_takes_the_place_of_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    recipe = demo.demo_recipe(demo.Arguments(text=(tmp_path / "a",)))
    assert recipe.data.source == "files"
    assert recipe.data.paths == (str(tmp_path / "a"),)
    with pytest.raises(UserError, match="b does not exist"):
        demo.demo_recipe(demo.Arguments(text=(tmp_path / "b",)))
