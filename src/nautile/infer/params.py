"""How a request wants its text: the knobs of sampling. No torch, so that command lines can show the defaults."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from nautile.core.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next tokens, and when to stop."""

    max_tokens: int = 16
    """Most tokens to generate."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities reach this sum (nucleus, 1904.09751)."""
    top_k: int = 0
    """Sample from so many most likely tokens; 0 for all. Cuts before top_p, as in transformers and vLLM."""
    seed: int | None = None
    """Seed of this request alone: the same prompt gives the same text in any batch. None draws a fresh one."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; the text is cut before the first of them. One may be given bare, none as None."""
    ignore_eos: bool = False
    """Go on after an end-of-sentence token, up to max_tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings(self.stop))
        whole, number = "it must be an integer", "it must be a finite number"
        for name, kind, why in (
            ("max_tokens", Integral, whole),
            ("top_k", Integral, whole),
            ("temperature", Real, number),
            ("top_p", Real, number),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
                raise _impossible(f"{name} {value!r}", why, "a number, such as 1")
        seed = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64):
            raise _impossible(f"seed {seed!r}", "it is an integer of 64 bits", "one from 0 on, or None")
        if not isinstance(self.ignore_eos, bool):
            raise _impossible(f"ignore_eos {self.ignore_eos!r}", "it is a choice of two", "True or False")
        rules = [
            (self.max_tokens >= 1, f"max_tokens {self.max_tokens}", "at least one token must be generated", "16"),
            (self.temperature >= 0, f"temperature {self.temperature}", "logits are divided by it", "0 for greedy, 1"),
            (0 < self.top_p <= 1, f"top_p {self.top_p}", "it is a probability greater than 0", "1 to keep every token"),
            (self.top_k >= 0, f"top_k {self.top_k}", "it counts tokens", "0 to keep every token"),
            (
                all(self.stop),
                f"stop {self.stop}",
                "an empty string ends every text at once",
                "strings that are not empty",
            ),
        ]
        for holds, what, why, cure in rules:
            if not holds:
                raise _impossible(what, why, cure)


def paired(params: SamplingParams | Sequence[SamplingParams], prompts: int) -> list[SamplingParams]:
    """Params for each of so many prompts.

    Raises:
        UserError: Their number is not that of the prompts, or they are no params.
    """
    each = [params] * prompts if isinstance(params, SamplingParams) else list(params)
    for one in each:
        if not isinstance(one, SamplingParams):
            raise UserError(
                f"sampling params are of type {type(one).__name__}",
                "they say how to choose tokens and when to stop",
                "give nautile.SamplingParams(temperature=..., max_tokens=...)",
            )
    if len(each) != prompts:
        raise UserError(
            f"{len(each)} sampling params for {prompts} prompts",
            "they are paired one to one",
            "give one SamplingParams for all prompts, or one for each",
        )
    return each


def _strings(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    for string in strings:
        if not isinstance(string, str):
            raise _impossible(f"stop {string!r}", "the text is searched for it", "a string, or a list of them")
    return strings  # type: ignore[return-value]


def _impossible(what: str, why: str, cure: str) -> UserError:
    return UserError(f"{what} is not possible", why, f"give {cure}")
