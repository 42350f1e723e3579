"""How a model's rotary frequencies were stretched for longer contexts: the fields of `rope_scaling`, in both spellings.

Published files write ``rope_theta`` and ``rope_scaling: {"type": ...}``; transformers 5 writes ``rope_parameters`` with
``rope_theta`` and ``rope_type`` in it. Nothing here imports torch; the formulas are in `nautile.layers.rope`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from nautile.core.errors import UserError
from nautile.core.nearest import suggestion
from nautile.core.typed import Mismatch, read_value


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (arXiv 2309.00071), as in a published config.json."""

    type: Literal["yarn"] = "yarn"
    """Kind of extension."""
    factor: float = 40.0
    """New context length over the original one."""
    original_max_position_embeddings: int = 4096
    """Context length, in tokens, that the model was first trained with."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this over the original context keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are slowed by the whole factor."""
    mscale: float = 1.0
    """Weight of the attention-temperature correction on the rotated part."""
    mscale_all_dim: float = 1.0
    """Weight of the attention-temperature correction on the whole softmax scale; 0 for none."""
    attention_factor: float | None = None
    """Factor on cos and sin; null computes it from the two mscales."""
    truncate: bool = True
    """Round the ends of the ramp between kept and slowed pairs to whole pairs."""


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by one factor (arXiv 2306.15595): DeepSeek-Coder's extension from 4K to 16K."""

    type: Literal["linear"] = "linear"
    """Kind of extension."""
    factor: float = 4.0
    """New context length over the original one."""


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's extension (arXiv 2407.21783 §3.4.2): slow frequencies divided, fast ones kept, a blend between."""

    type: Literal["llama3"] = "llama3"
    """Kind of extension."""
    factor: float = 8.0
    """Divisor of the slow frequencies."""
    low_freq_factor: float = 1.0
    """Frequencies that turn less often than this over the original context are divided by the whole factor."""
    high_freq_factor: float = 4.0
    """Frequencies that turn more often than this are kept."""
    original_max_position_embeddings: int = 8192
    """Context length, in tokens, that the model was first trained with."""


RopeScaling = YarnScaling | LinearScaling | Llama3Scaling
KINDS: dict[str, type[RopeScaling]] = {"yarn": YarnScaling, "linear": LinearScaling, "llama3": Llama3Scaling}
"""``type`` in a config.json → its fields."""


def read_rope(published: Mapping[str, Any], theta: float = 10000.0) -> tuple[float, RopeScaling | None]:
    """Base of the frequencies, and their extension or None, from a config.json in either spelling.

    Args:
        published: The whole config.json.
        theta: The base where the file names none.

    Raises:
        UserError: The kind of extension is not one of `KINDS`, or a field it cannot do without is missing.
    """
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(
            f"config.json: rope_scaling is {rope!r}", "it is an object, or null", "copy the published config.json again"
        )
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = _read("rope_theta", float, rope.pop("rope_theta", None) or published.get("rope_theta") or theta)
    kinds = (rope.pop("rope_type", None), rope.pop("type", None))  # some files name it twice
    kind = kinds[0] or kinds[1] or "default"
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    if kind == "default" and not rope:
        return theta, None
    if kind not in KINDS and kind != "default":
        raise UserError(
            f"config.json: rope_scaling type {kind!r} is not supported",
            f"nautile turns positions as {', '.join(KINDS)} or without scaling",
            suggestion(str(kind), KINDS, "kinds"),
        )
    hints = get_type_hints(KINDS[kind]) if kind in KINDS else {}
    known = set(hints) - {"type"}
    for key in rope:
        if key not in known:
            raise UserError(
                f"config.json: {key} in a rope_scaling of type {kind!r} is not known",
                "it may ask for another rotation than the one built here",
                suggestion(key, sorted(known), "fields") if known else "check that config.json belongs to the model",
            )
    values = {key: _read(key, hints[key], value) for key, value in rope.items()}
    if kind == "yarn":
        # A file without mscale_all_dim asks for no correction of the softmax scale; without mscale it means 1.
        values.setdefault("mscale_all_dim", 0.0)
        values.setdefault("original_max_position_embeddings", published.get("max_position_embeddings"))
    missing = [
        name for name in ("factor", "original_max_position_embeddings") if name in known and not values.get(name)
    ]
    if missing:
        raise UserError(
            f"config.json: rope_scaling of type {kind!r} has no {missing[0]}",
            "the frequencies depend on it",
            f"add {missing[0]} as in the model's published config.json",
        )
    return theta, KINDS[kind](**values)


def _read(name: str, hint: Any, value: Any) -> Any:
    try:
        return read_value(hint, value, (name,), lambda *_: None)
    except Mismatch as mismatch:
        raise UserError(
            f"config.json: {name} is {value!r}", f"it must be {mismatch.expected}", "correct the value"
        ) from None
