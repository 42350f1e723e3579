"""How a model's rotary frequencies were stretched for longer contexts: the fields of `rope_scaling`, in both spellings.

Published files write ``rope_theta`` and ``rope_scaling: {"type": ...}``; transformers 5 writes ``rope_parameters`` with
``rope_theta`` and ``rope_type`` in it. Nothing here imports torch; the formulas are in `nautile.layers.rope`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from nautile.core.errors import UserError
from nautile.core.nearest import suggestion


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
    rope = dict(published.get("rope_parameters") or published.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or published.get("rope_theta") or theta)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in KINDS:
        raise UserError(
            f"config.json: rope_scaling type {kind!r} is not supported",
            f"nautile turns positions as {', '.join(KINDS)} or without scaling",
            suggestion(str(kind), KINDS, "kinds"),
        )
    known = {field.name for field in fields(KINDS[kind])} - {"type"}
    values = {key: value for key, value in rope.items() if key in known and value is not None}
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
