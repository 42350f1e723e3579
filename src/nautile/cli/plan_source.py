"""Where a plan's shape comes from: a recipe, a preset, a config.json here, or one on the Hub."""

from dataclasses import dataclass
from pathlib import Path

from nautile.checkpoint.hub import download, remote_name
from nautile.core.errors import UserError
from nautile.core.json_file import read_json_object
from nautile.core.nearest import suggestion
from nautile.models.accounting.shape import Shape, shape_from_config
from nautile.models.presets import PRESETS
from nautile.train.recipe import load_recipe, shipped_recipes

DEEPSEEK_67B = shape_from_config(PRESETS["deepseek-llm-67b"].to_hf(), "DeepSeek 67B")
"""The dense predecessor against which the V2 paper states its savings."""


@dataclass(frozen=True)
class Source:
    """A shape, and what its origin says about the batch."""

    shape: Shape
    origin: str
    """Sentence part for the reader: "recipe v3-micro"."""
    sequence_length: int | None = None
    """Tokens per sequence, where the origin is a recipe."""
    batch_size: int | None = None
    """Sequences per forward, likewise."""


def find_source(word: str) -> Source:
    """What `word` names. A recipe comes before a preset of the same name: it says more.

    Raises:
        UserError: Nothing of that name; the nearest one is suggested.
    """
    path = Path(word)
    if path.suffix in (".yaml", ".yml") or word in shipped_recipes():
        return _from_recipe(word)
    if word in PRESETS:
        return Source(shape_from_config(PRESETS[word].to_hf(), word), f"preset {word}")
    for file in (path, path / "config.json", path / "model" / "config.json"):
        if file.is_file():
            return _from_json(file)
    if (path / "config.yaml").is_file():  # a run that has not exported its model yet
        return _from_recipe(str(path / "config.yaml"))
    if remote := remote_name(word):
        return _from_json(download(remote, weights=False) / "config.json", word)
    names = [*shipped_recipes(), *PRESETS]
    raise UserError(
        f"nothing to plan is called {word!r}",
        "it is no recipe and no preset, and no config.json lies there",
        suggestion(word, dict.fromkeys(names), "names"),
    )


def _from_recipe(word: str) -> Source:
    recipe = load_recipe(word)
    shape = shape_from_config(recipe.model.to_hf(), recipe.name)
    batch = recipe.train.micro_batch_size or recipe.train.batch_size
    return Source(shape, f"recipe {word}", recipe.train.sequence_length, batch)


def _from_json(file: Path, origin: str | None = None) -> Source:
    purpose = "a plan reads a model's config.json, or a recipe whose name ends in .yaml"
    published = read_json_object(file, purpose, "check the file")
    return Source(shape_from_config(published, origin or str(file)), origin or str(file))
