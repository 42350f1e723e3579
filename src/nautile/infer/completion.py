"""One answer while it grows: its tokens, its text, and when it ends."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol

from nautile.infer.params import SamplingParams
from nautile.infer.stop import StopStrings

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Output:
    """What was generated for one prompt."""

    text: str
    """The text, without the stop string or the end-of-sentence token; empty where there is no tokenizer."""
    token_ids: list[int]
    """Every generated token, including the one that ended it."""
    finish_reason: FinishReason
    """"stop": end-of-sentence token or a stop string; "length": max_tokens or the end of the context."""
    reasoning: str = ""
    """What `LLM.chat` found between ``<think>`` and ``</think>``; it is not part of the text then."""


class Decoder(Protocol):
    """Token ids to text, one at a time, whole characters only (`nautile.text.stream.IncrementalDecoder`)."""

    def push(self, token_id: int, /) -> str:
        """Text that has become certain by this token."""
        ...

    def flush(self) -> str:
        """The rest."""
        ...


class Completion:
    """Takes tokens until `finish_reason` is set.

    Args:
        params: What the request asked for.
        max_tokens: Most tokens to take: the request's, or fewer where the context ends.
        eos_ids: Tokens that end it.
        decoder: Text of the tokens; None without a tokenizer.
    """

    def __init__(
        self, params: SamplingParams, max_tokens: int, eos_ids: Collection[int], decoder: Decoder | None
    ) -> None:
        self.max_tokens = max_tokens
        self.eos_ids = () if params.ignore_eos else eos_ids
        self.decoder = decoder
        self.stop = StopStrings(params.stop)
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    def push(self, token_id: int) -> str:
        """Take a token; return the text that is certain by now and was not returned before."""
        self.token_ids.append(token_id)
        ended = token_id in self.eos_ids
        new = "" if ended else self._certain_text(token_id)
        if ended or self.stop.found is not None:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            new += self._rest()
        self.text += new
        return new

    def _certain_text(self, token_id: int) -> str:
        return self.stop.push(self.decoder.push(token_id)) if self.decoder else ""

    def _rest(self) -> str:
        """What decoder and stop strings still hold when no token follows. It may complete a stop string."""
        if self.decoder is None or self.stop.found is not None:
            return ""
        rest = self.stop.push(self.decoder.flush())
        if self.stop.found is not None:
            self.finish_reason = "stop"
        return rest + self.stop.flush()

    def output(self) -> Output:
        """The finished answer."""
        assert self.finish_reason is not None
        return Output(self.text, self.token_ids, self.finish_reason)
