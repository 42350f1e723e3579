"""Which family a config.json belongs to, and that family's classes. No torch until a model is built."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nautile.core.errors import UserError
from nautile.core.json_file import read_json_object
from nautile.core.nearest import nearest
from nautile.models import FAMILIES
from nautile.models.config import DecoderConfig

if TYPE_CHECKING:
    from nautile.checkpoint.layout import Layout
    from nautile.models.causal_lm import CausalLM


def read_published(folder: Path) -> dict[str, Any]:
    """Contents of a folder's config.json.

    Raises:
        UserError: It is not a JSON object.
    """
    return read_json_object(folder / "config.json", "the model's shape is read from it")


def read_config(folder: Path, overrides: Mapping[str, Any] | None = None) -> DecoderConfig:
    """Configuration of a model folder, some fields replaced by `overrides`.

    Raises:
        UserError: The file is not JSON, names an unknown family, or a field is missing or impossible.
    """
    published = read_published(folder)
    try:
        config = config_from_hf(published)
    except UserError as error:
        what = error.what.replace("config.json", str(folder / "config.json"), 1)
        raise UserError(what, error.why, error.cure) from None
    return config.overridden(overrides) if overrides else config


def config_from_hf(published: Mapping[str, Any]) -> DecoderConfig:
    """Configuration that a published config.json, in either spelling, describes.

    Raises:
        UserError: As `read_config`.
    """
    family = published.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"config.json: model_type {family!r} is not supported",
            f"nautile builds {', '.join(FAMILIES)}; the nearest of them is {_nearest(family, published)}",
            "name a checkpoint of one of these families",
        )
    return _class_of(str(family), "config", "Config").from_hf(published)


def build_model(config: DecoderConfig, experts: range | None = None) -> "CausalLM":
    """A model of this configuration, its weights uninitialised.

    Args:
        config: The shape.
        experts: The routed experts that this process holds; None for all.

    Raises:
        UserError: `experts` of a family without any, or outside those there are.
    """
    model = _class_of(config.MODEL_TYPE, "model", "ForCausalLM")
    if experts is None:
        return model(config)
    total = getattr(config, "n_routed_experts", 0)
    if experts.step != 1 or not 0 <= experts.start < experts.stop <= total:
        raise UserError(
            f"experts {experts} cannot be held",
            f"a {config.MODEL_TYPE} layer of this model has {total} experts",
            f"give a part of range({total})" if total else "leave experts out",
        )
    return model(config, experts)


def layout_of(config: DecoderConfig, experts: range | None = None) -> "Layout":
    """Where the model's parameters lie in a published folder; `experts` as in `build_model`."""
    from nautile.checkpoint.layout import only_local_experts

    layout = import_module(f"{FAMILIES[config.MODEL_TYPE][0]}.checkpoint").layout(config)
    return layout if experts is None else only_local_experts(layout, experts)


def _nearest(family: Any, published: Mapping[str, Any]) -> str:
    """The family most like the one asked for; of a wrapper of several models, that of its language model."""
    for part in ("language_config", "text_config"):
        inner = published.get(part)
        if isinstance(inner, Mapping) and inner.get("model_type") in FAMILIES:
            return f"{inner['model_type']}, that of its {part}, which cannot be read from inside another model yet"
    near = nearest(str(family), FAMILIES) or "deepseek_v3"
    return f"{near}, which is another architecture"


def _class_of(family: str, module: str, suffix: str) -> Any:
    package, stem = FAMILIES[family]
    return getattr(import_module(f"{package}.{module}"), f"{stem}{suffix}")
