"""Sampling that comes with a model: its generation_config.json, the file that transformers and vLLM go by.

Who speaks of sampling at all decides it whole: a file with a temperature and no top_p means the full distribution, not
somebody else's top_p.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from nautile.core.errors import UserError
from nautile.core.json_file import read_json_object
from nautile.infer.params import SamplingParams

FILE = "generation_config.json"
SAMPLING = ("temperature", "top_p", "top_k")
"""Fields of the file and of `SamplingParams` that shape the distribution."""
SILENT: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("repetition_penalty", "typical_p", "length_penalty", "num_beams", "num_return_sequences"), (1, 1.0)
    ),
    "encoder_repetition_penalty": (1, 1.0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_length", "min_p", "no_repeat_ngram_size"), (0, 0.0)),
}
"""Values with which a field changes nothing, so that nobody misses it where it is not applied."""
BOOKKEEPING = {
    *("_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("do_sample", "max_new_tokens", "return_dict_in_generate", "output_attentions", "output_hidden_states"),
}
"""Fields that are applied elsewhere or are not about sampling."""

NEUTRAL: Mapping[str, float] = {"temperature": 0.7, "top_p": 0.95}
"""Sampling of an answer about which nobody says anything."""
ANSWER_TOKENS = 2048
"""Length of an answer where neither the request nor the model says one."""


@dataclass(frozen=True)
class Defaults:
    """What a source says about generating."""

    values: Mapping[str, float] = field(default_factory=dict)
    """Field of `SamplingParams` → value."""
    source: str = ""
    """Who says so, for people."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""
    not_applied: Mapping[str, Any] = field(default_factory=dict)
    """What the source asks for besides, and does not get here."""

    @property
    def shapes(self) -> bool:
        """Whether it says anything about the distribution."""
        return any(name in self.values for name in SAMPLING)

    def params(self) -> SamplingParams:
        """As sampling params; what the source leaves open is neutral."""
        return SamplingParams(**self.values)  # type: ignore[arg-type]


def read_defaults(folder: Path) -> Defaults:
    """What a model folder's generation_config.json says; nothing where there is none.

    ``do_sample: false`` is greedy decoding; a missing do_sample leaves temperature and top_p in force, as in vLLM.

    Raises:
        UserError: It is not a JSON object, or a value is impossible.
    """
    file = folder / FILE
    if not file.is_file():
        return Defaults()
    fields = _read(file)
    values = {name: fields[name] for name in SAMPLING if fields.get(name) is not None}
    if values.get("top_k", 0) < 0:  # −1 is off
        values["top_k"] = 0
    if fields.get("do_sample") is False:
        values["temperature"] = 0.0
    if fields.get("max_new_tokens") is not None:
        values["max_tokens"] = fields["max_new_tokens"]
    eos_ids = _eos_ids(file, fields.get("eos_token_id"))
    known = {*SAMPLING, *BOOKKEEPING}
    ignored = {
        name: value
        for name, value in fields.items()
        if name not in known and value not in (None, False, [], {}) and value not in SILENT.get(name, ())
    }
    defaults = Defaults(values, FILE, eos_ids, ignored)
    try:
        defaults.params()
    except UserError as error:
        raise UserError(f"{file}: {error.what}", error.why, error.cure) from None
    return defaults


def resolve(
    given: Mapping[str, float | None], sources: Sequence[Defaults], neutral: Mapping[str, float]
) -> tuple[dict[str, float], str]:
    """Values for a request, and a line that says where each comes from.

    Args:
        given: What the user chose by hand; None where nothing was.
        sources: Who speaks for the model, the most trusted first. The first that shapes the distribution does it alone.
        neutral: What holds where nobody says anything.
    """
    shaping = next((source for source in sources if source.shapes), Defaults(neutral, "nautile's defaults"))
    off = SamplingParams()
    chosen: list[tuple[str, float, str]] = []
    for name in SAMPLING:
        value = given.get(name)
        source = "as asked" if value is not None else shaping.source
        chosen.append((name, shaping.values.get(name, getattr(off, name)) if value is None else value, source))
    values = {name: value for name, value, _ in chosen}
    lengths = [given.get("max_tokens"), *(source.values.get("max_tokens") for source in sources), neutral["max_tokens"]]
    values["max_tokens"] = next(length for length in lengths if length is not None)
    return values, describe(chosen)


def describe(chosen: Sequence[tuple[str, float, str]]) -> str:
    """``sampling: temperature 0.6, top_p 0.95 (generation_config.json)``: what matters, and who said it."""
    off = SamplingParams()
    greedy = [item for item in chosen if item[0] == "temperature" and item[1] == 0]
    if greedy:
        return f"sampling: greedy, temperature 0 ({greedy[0][2]})"
    telling = [item for item in chosen if item[0] == "temperature" or item[1] != getattr(off, item[0])]
    parts = [
        ", ".join(f"{name} {value:g}" for name, value, _ in group) + f" ({source})"
        for source, group in groupby(telling, key=lambda item: item[2])
    ]
    return "sampling: " + ", ".join(parts)


def _read(file: Path) -> dict[str, Any]:
    fields = read_json_object(file, "sampling defaults are read from it", "copy the file again, or remove it")
    kinds = {"temperature": int | float, "top_p": int | float, "top_k": int, "max_new_tokens": int}
    for name, kind in kinds.items():
        value = fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise _wrong(file, name, value, "an integer" if kind is int else "a number", "sampling goes by it")
    return fields


def _eos_ids(file: Path, eos: object) -> tuple[int, ...]:
    listed = [] if eos is None else eos if isinstance(eos, list) else [eos]
    ids = [token_id for token_id in listed if isinstance(token_id, int) and not isinstance(token_id, bool)]
    if len(ids) < len(listed):
        raise _wrong(file, "eos_token_id", eos, "a token id or a list of them", "answers end with it")
    return tuple(ids)


def _wrong(file: Path, name: str, value: object, noun: str, why: str) -> UserError:
    return UserError(f"{file}: {name} {value!r} is not {noun}", why, "correct or remove it")
