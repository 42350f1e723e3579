from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from nautile.cli.flags import first_word, parse
from nautile.core.errors import UserError
from nautile.models.deepseek_v3.config import V3_MICRO, V3_NANO, DeepseekV3Config


@dataclass(frozen=True)
class Train:
    steps: int = 10
    """Steps to train."""
    stop_after: int | None = None
    learning_rate: float = 1e-3
    precision: Literal["float32", "bfloat16"] = "float32"
    shuffle: bool = True


@dataclass(frozen=True)
class Recipe:
    train: Train = Train()
    model: DeepseekV3Config = V3_MICRO


@dataclass(frozen=True)
class Args:
    name: tyro.conf.Positional[str]
    """A recipe."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = Recipe()
    out: Path = Path("runs/x")


def read(*words: str, default: Args | None = None) -> Args:
    return parse(Args, default, words, "nautile try", "Tries.", ["nautile try a", "nautile try b --train.steps 4"])


def refusal(*words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        read(*words)
    return caught.value


def test_flags_are_dotted_without_the_name_of_the_flattened_recipe():
    args = read("a", "--train.steps", "40", "--model.n-group=2", "--out", "runs/y")
    assert (args.name, args.recipe.train.steps, args.recipe.model.n_group) == ("a", 40, 2)
    assert args.out == Path("runs/y")


@pytest.mark.parametrize("flag", ["--train.stop-after", "--train.stop_after"])
def test_dash_and_underscore_mean_the_same(flag):
    assert read("a", flag, "3").recipe.train.stop_after == 3


def test_what_is_not_named_keeps_the_value_of_the_default():
    default = Args("a", Recipe(Train(steps=99, learning_rate=3e-4), V3_NANO), Path("runs/z"))
    args = read("b", "--train.no-shuffle", default=default)
    assert args == Args("b", Recipe(Train(99, None, 3e-4, "float32", False), V3_NANO), Path("runs/z"))


@pytest.mark.parametrize(
    ("words", "what", "cure"),
    [
        (("a", "--train.stepz", "4"), "unknown flag --train.stepz", "did you mean --train.steps?"),
        (("a", "--steps=4"), "unknown flag --steps", "did you mean --train.steps?"),
        (("a", "--n_group", "4"), "unknown flag --n_group", "did you mean --model.n-group?"),
        (("a", "--zzzzzz"), "unknown flag --zzzzzz", "nautile try --help lists the flags"),
        (("a", "b"), "'b' is one argument too many", "nautile try --help"),
    ],
)
def test_unknown_words_name_the_nearest_flag(words, what, cure):
    error = refusal(*words)
    assert (error.what, error.cure, error.exit_code) == (what, cure, 2)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("a", "--train.steps", "many"), ("--train.steps", "many")),
        (("a", "--train.steps", "1.5"), ("--train.steps", "1.5")),
        (("a", "--train.precision", "float16"), ("--train.precision", "float16", "bfloat16")),
        (("a", "--train.steps"), ("Missing value", "--train.steps")),
        ((), ("Missing", "recipe")),
    ],
)
def test_wrong_values_are_told_in_one_line(words, parts, capsys):
    error = refusal(*words)
    assert all(part in error.what for part in parts)
    assert len(str(error).splitlines()) == 3
    assert error.exit_code == 2
    assert capsys.readouterr().err == ""


def test_help_shows_examples_and_the_values_of_the_default(capsys):
    with pytest.raises(SystemExit) as ended:
        read("--help", default=Args("a", Recipe(Train(steps=99))))
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "nautile try b --train.steps 4" in out
    assert "Steps to train. (default: 99)" in out


def test_first_word():
    assert first_word(["v3-micro", "--x"]) == "v3-micro"
    assert first_word(["--resume", "runs/x"]) is None
    assert first_word([]) is None
