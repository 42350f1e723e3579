from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautile.core.config import difference, dump_yaml, field_docs, from_mapping, load_yaml, to_mapping
from nautile.core.errors import UserError


@dataclass(frozen=True)
class Rope:
    factor: float = 40.0
    """Stretch."""
    kind: Literal["yarn", "linear"] = "yarn"


@dataclass(frozen=True)
class Optim:
    learning_rate: float = 1e-3
    """Peak rate.

    Per step.
    """
    betas: tuple[float, float] = (0.9, 0.95)
    nesterov: bool = False


@dataclass(frozen=True)
class Recipe:
    seed: int
    name: str = "run"
    optim: Optim = Optim(learning_rate=0.5)
    rope: Rope | None = None
    paths: tuple[str, ...] = ()
    limit: int | None = None
    weights: dict[str, float] = field(default_factory=dict)


PRESETS = {"rope": {"long": Rope(factor=8.0), "short": Rope(factor=2.0, kind="linear")}}


def read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    return load_yaml(Recipe, path, PRESETS)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_a_recipe_holds_only_what_differs(tmp_path):
    recipe = read(tmp_path, "seed: 3\noptim:\n  nesterov: true\npaths: [a, b]\n")
    # Fields of a section that the recipe leaves out keep the default of the recipe class, not of the section's class.
    assert recipe == Recipe(seed=3, optim=Optim(learning_rate=0.5, nesterov=True), paths=("a", "b"))


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("2", 2.0), ("'3e4'", 3e4), ("-.5", -0.5)]
)
def test_numbers_that_floats_accept(tmp_path, text, value):
    rate = read(tmp_path, f"seed: 0\noptim: {{learning_rate: {text}}}").optim.learning_rate
    assert rate == value
    assert type(rate) is float


@pytest.mark.parametrize(
    ("text", "first_line"),
    [
        ("seed: 1\noptim:\n  lerning_rate: 1", "recipe.yaml:3: unknown key 'lerning_rate' in optim"),
        ("seed: 1\n\nsed: 2", "recipe.yaml:3: unknown key 'sed'"),
        ("seed: true", "recipe.yaml:1: seed is true"),
        ("seed: 1.0", "recipe.yaml:1: seed is 1.0"),
        ("seed: '1'", "recipe.yaml:1: seed is 1"),
        ("seed: 1\nname: no", "recipe.yaml:2: name is false"),
        ("seed: 1\noptim:\n  learning_rate: yes", "recipe.yaml:3: optim.learning_rate is true"),
        ("seed: 1\noptim:\n  learning_rate: fast", "recipe.yaml:3: optim.learning_rate is fast"),
        ("seed: 1\noptim:\n  nesterov: 1", "recipe.yaml:3: optim.nesterov is 1"),
        ("seed: 1\noptim:\n  betas: [1, 2, 3]", "recipe.yaml:3: optim.betas is [1, 2, 3]"),
        ("seed: 1\noptim:\n  betas:\n  - 1\n  - x", "recipe.yaml:5: optim.betas.1 is x"),
        ("seed: 1\noptim: adam", "recipe.yaml:2: optim is adam"),
        ("seed: 1\npaths: data", "recipe.yaml:2: paths is data"),
        ("seed: 1\nlimit: many", "recipe.yaml:2: limit is many"),
        ("seed: 1\nrope:\n  factr: 2", "recipe.yaml:3: unknown key 'factr' in rope"),
        ("seed: 1\nrope:\n  kind: yarm", "recipe.yaml:3: rope.kind is yarm"),
        ("seed: 1\nrope:\n  preset: lomg", "recipe.yaml:3: unknown preset 'lomg' in rope"),
        ("seed: 1\noptim:\n  preset: x", "recipe.yaml:3: unknown key 'preset' in optim"),
        ("seed: 1\nweights:\n  a: b", "recipe.yaml:3: weights.a is b"),
        ("name: x", "recipe.yaml:1: missing key 'seed'"),
        ("", "recipe.yaml:1: missing key 'seed'"),
        ("- 1", "recipe.yaml:1: expected keys and values, got list"),
        ("seed: 1\nseed: 2", "recipe.yaml:2: key 'seed' is there twice"),
        ("seed: 1\nname: [a", "recipe.yaml:2: not valid YAML"),
        ("seed: 1\npaths: &p [*p]", "recipe.yaml:2: nested too deep"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, text, first_line):
    lines = refusal(tmp_path, text).splitlines()
    assert lines[0] == first_line
    assert [line[:7] for line in lines[1:]] == ["  why: ", "  try: "]


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("seed: 1\noptim:\n  lerning_rate: 1", "did you mean 'learning_rate'?"),
        ("seed: 1\nrope: {kind: yarm}", "did you mean 'yarn'?"),
        ("seed: 1\nrope: {preset: lomg}", "did you mean 'long'?"),
        ("seed: 1\nqqq: 1", "the keys here are: seed, name, optim, rope, paths, limit, weights"),
        ("seed: 1\nname: 12", "put it in quotes"),
    ],
)
def test_mistakes_name_the_cure(tmp_path, text, cure):
    assert refusal(tmp_path, text).splitlines()[2] == f"  try: {cure}"


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_yaml(Recipe, tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=r"(?s)no such file.*did you mean .*/recipe\.yaml"):
        load_yaml(Recipe, tmp_path / "recipes.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(Recipe, tmp_path)
    with pytest.raises(UserError, match="not valid YAML"):
        read(tmp_path, "name: \x00")


def test_a_preset_is_the_base_of_its_section(tmp_path):
    assert read(tmp_path, "seed: 1\nrope: {preset: short}").rope == Rope(2.0, "linear")
    assert read(tmp_path, "seed: 1\nrope:\n  factor: 3\n  preset: short").rope == Rope(3.0, "linear")


@given(
    st.builds(
        Recipe,
        seed=st.integers(),
        name=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co"])),
        optim=st.builds(Optim, learning_rate=st.floats(allow_nan=False), nesterov=st.booleans()),
        rope=st.none() | st.builds(Rope, factor=st.floats(allow_nan=False, allow_infinity=False)),
        paths=st.lists(st.sampled_from(["1e-3", "no", "null", "~", "a: b", "", "日本", "0x1f", "1_000"])).map(tuple),
        limit=st.none() | st.integers(),
        weights=st.dictionaries(st.sampled_from(["a", "b c", "ä"]), st.floats(allow_nan=False)),
    )
)
def test_what_is_dumped_is_read_back_equal(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    dump_yaml(recipe, path)
    assert load_yaml(Recipe, path, PRESETS) == recipe
    assert from_mapping(Recipe, to_mapping(recipe)) == recipe


def test_from_mapping_names_where():
    with pytest.raises(UserError, match=r"^checkpoint: unknown key 'sed'"):
        from_mapping(Recipe, {"sed": 1}, where="checkpoint")


def test_difference_lists_dotted_fields():
    before = Recipe(seed=1, rope=Rope(), paths=("a",))
    after = Recipe(seed=1, optim=Optim(0.5, nesterov=True), paths=("a", "b"), limit=3)
    assert difference(before, after) == [
        "optim.nesterov: false → true",
        "rope.factor: 40.0 → (absent)",
        "rope.kind: yarn → (absent)",
        "paths: ['a'] → ['a', 'b']",
        "limit: null → 3",
        "rope: (absent) → null",
    ]
    assert difference(before, before) == []


def test_field_docs_are_the_strings_below_the_fields():
    @dataclass(frozen=True)
    class Longer(Rope):
        extra: int = 0
        """One more."""

    assert field_docs(Optim) == {"learning_rate": "Peak rate.\n\nPer step."}
    assert field_docs(Longer) == {"factor": "Stretch.", "extra": "One more."}
