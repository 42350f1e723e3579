"""The fields and rules of every family, and how a configuration is read from a config.json and written to one."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from types import NoneType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from nautile.core.errors import UserError
from nautile.core.nearest import nearest, suggestion
from nautile.core.typed import Mismatch, read_value
from nautile.layers.rope_scaling import RopeScaling, read_rope

Rule = tuple[bool, str, str]
"""Whether it holds, what is wrong where it does not, and why that is impossible."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer with RMSNorm, SwiGLU and rotary positions."""

    MODEL_TYPE: ClassVar[str]
    """`model_type` of its config.json."""
    ARCHITECTURE: ClassVar[str]
    """Class name in its config.json."""
    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (  # each mixin names its own
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    FIXED: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "attention_dropout": 0.0}
    """Fields of a file that have one value here: written on saving, any other is refused. Mixins add theirs."""
    ONLY: ClassVar[Mapping[str, Any]] = {"partial_rotary_factor": 1.0}
    """Fields that some files have and that have one value here: any other is refused, and they are not written."""
    FILE_DEFAULTS: ClassVar[Mapping[str, Any]] = {"initializer_range": 0.02}
    """What a config.json means that leaves a field out, where that differs from the defaults below."""

    vocab_size: int
    """Rows of the embedding and of the output head."""
    hidden_size: int
    """Width D of the residual stream."""
    intermediate_size: int
    """Width of the SwiGLU in dense layers."""
    num_hidden_layers: int
    """Decoder layers, without MTP modules."""
    num_attention_heads: int
    """Query heads H."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Context extension; null for plain RoPE."""
    max_position_embeddings: int = 4096
    """Longest sequence, in tokens."""
    rms_norm_eps: float = 1e-6
    """Epsilon of the RMSNorms."""
    tie_word_embeddings: bool = False
    """Use the embedding as the output head."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    bos_token_id: int | None = None
    """Id that begins a document; null where the family has none."""
    eos_token_id: int | tuple[int, ...] | None = None
    """Id or ids that end a document or an answer."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end a document or an answer."""
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    def check(self) -> None:
        """Raise `UserError` if a field is impossible or two contradict each other."""
        for name in (name for part in _own(type(self), "AT_LEAST_ONE") for name in part):
            if getattr(self, name) < 1:
                raise UserError(
                    f"model: {name} {getattr(self, name)} is not possible", "a model needs one", "give 1 or more"
                )
        for name, choices in _choices(type(self)).items():
            value = getattr(self, name)
            if value not in choices:
                near = nearest(str(value), choices)
                raise UserError(
                    f"model: {name} {value!r} is not known",
                    f"nautile knows {', '.join(choices)}",
                    f"did you mean {near!r}?" if near else "check that config.json belongs to a model built here",
                )
        for holds, what, why in self.rules():
            if not holds:
                raise UserError(
                    f"model: {what} is not possible", why, "correct the value in config.json or in the recipe"
                )

    def rules(self) -> Iterator[Rule]:
        """What must hold between the fields; mixins add theirs."""
        yield self.rope_theta > 1, f"rope_theta {self.rope_theta}", "frequencies fall with powers of it"
        yield self.rms_norm_eps >= 0, f"rms_norm_eps {self.rms_norm_eps}", "a root is taken of what it is added to"

    @classmethod
    def from_hf(cls, published: Mapping[str, Any]) -> Self:
        """Read a config.json in the published spelling or in transformers 5's (`rope_parameters`).

        Raises:
            UserError: A field is missing, impossible, or asks for something this family does not do.
        """
        _refuse_what_is_not_built(cls, published)
        defaults = {key: value for part in _own(cls, "FILE_DEFAULTS") for key, value in part.items()}
        values = {**defaults, **cls.read_fields(published)}
        missing = [f.name for f in fields(cls) if f.name not in values and f.default is MISSING]
        if missing:
            raise UserError(
                f"config.json: {missing[0]} is missing",
                f"a {cls.MODEL_TYPE} model cannot be built without it",
                "copy the model's complete config.json",
            )
        config = cls(**values)
        config.check()
        return config

    @classmethod
    def read_fields(cls, published: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields as the file gives them; absent ones, and null where null has no meaning, keep their defaults."""
        hints = get_type_hints(cls)
        values = {}
        for name in {field.name for field in fields(cls)} - {"rope_theta", "rope_scaling"}:
            value = published.get(name)
            if value is not None or (name in published and NoneType in get_args(hints[name])):
                values[name] = _read(name, hints[name], value)
        values["rope_theta"], values["rope_scaling"] = read_rope(published)
        return values

    def overridden(self, overrides: Mapping[str, Any]) -> Self:
        """This configuration with some fields replaced; `rope_scaling` in the published spelling.

        Raises:
            UserError: A name is no field, or a value is of another type or impossible.
        """
        hints = get_type_hints(type(self))
        names = [field.name for field in fields(self)]
        values = {}
        for name, value in overrides.items():
            if name not in names:
                raise UserError(
                    f"{name!r} cannot be overridden",
                    f"a {self.MODEL_TYPE} configuration has no such field",
                    suggestion(name, names, "fields"),
                )
            scaling = name == "rope_scaling" and isinstance(value, Mapping)
            values[name] = read_rope({"rope_scaling": value})[1] if scaling else _read(name, hints[name], value)
        config = replace(self, **values)
        config.check()
        return config

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model, in the published spelling."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if self.rope_scaling is not None:
            scaling = asdict(self.rope_scaling)
            values["rope_scaling"] = {key: value for key, value in scaling.items() if value is not None}
        return {
            "architectures": [self.ARCHITECTURE],
            "model_type": self.MODEL_TYPE,
            **values,
            **_fixed(type(self)),
            "use_cache": True,
        }


def _own(cls: type, name: str) -> list[Any]:
    """The class variable `name` of a configuration and of all its bases, bases first."""
    return [vars(base)[name] for base in reversed(cls.__mro__) if name in vars(base)]


def _fixed(cls: type[DecoderConfig], name: str = "FIXED") -> dict[str, Any]:
    return {key: value for part in _own(cls, name) for key, value in part.items()}


def _choices(cls: type[DecoderConfig]) -> dict[str, tuple[str, ...]]:
    hints = get_type_hints(cls)
    return {f.name: get_args(hints[f.name]) for f in fields(cls) if get_origin(hints[f.name]) is Literal}


def _read(name: str, hint: Any, value: Any) -> Any:
    """One value of a config.json, as its field's type; a Literal's members are checked with the other rules."""
    try:
        return read_value(str if get_origin(hint) is Literal else hint, value, (name,), lambda *_: None)
    except Mismatch as mismatch:
        raise UserError(
            f"config.json: {name} is {value!r}",
            f"it must be {mismatch.expected}",
            "copy the model's published config.json again, or correct the value",
        ) from None


def _refuse_what_is_not_built(cls: type[DecoderConfig], published: Mapping[str, Any]) -> None:
    for name, only in (_fixed(cls) | _fixed(cls, "ONLY")).items():
        value = published.get(name)
        if value is not None and value != only:
            raise UserError(
                f"config.json: {name} {value!r} is not supported",
                f"{cls.MODEL_TYPE} models here have {only!r}; the weights would be used for another computation",
                f"check that config.json belongs to the weights, or set {name} to {only!r}",
            )
