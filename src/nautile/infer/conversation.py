"""Turns of a conversation, and the part of them that fits the model's context."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from nautile.infer.llm import LLM
from nautile.infer.params import SamplingParams
from nautile.infer.prompt import needs_tokenizer
from nautile.text.chat_template import ChatTemplate


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: Literal["user", "assistant"]
    content: str


class Conversation:
    """Remembers what was said and asks the model for the next turn.

    With a chat template the turns become messages. Without one the model is a base model: the turns are one running
    text that it continues. When the turns outgrow the context, the oldest are left out: whole exchanges of messages,
    or the beginning of the running text.

    Args:
        llm: The model.
        params: How to sample each turn.
        template: Its chat template; None to continue text.
    """

    def __init__(self, llm: LLM, params: SamplingParams, template: ChatTemplate | None = None) -> None:
        self.llm, self.params, self.template = llm, params, template
        self.tokenizer = needs_tokenizer(llm.tokenizer, "a conversation")
        self.turns: list[Turn] = []

    def reply(self, line: str) -> Generator[str]:
        """Say `line`; yields the model's turn in pieces. A turn that is broken off is remembered as far as it came."""
        self.turns.append(Turn("user", line))
        pieces = []
        try:
            for piece in self.llm.stream(self.prompt(), self.params):
                pieces.append(piece)
                yield piece
        except BaseException:
            if not pieces:  # nothing was said in return, so nothing was said
                self.turns.pop()
            raise
        else:
            if not pieces and self.template is not None:  # an empty answer is one: templates want sides to alternate
                self.turns.append(Turn("assistant", ""))
        finally:
            if pieces:
                self.turns.append(Turn("assistant", "".join(pieces)))

    def reset(self) -> None:
        """Forget everything."""
        self.turns.clear()

    def prompt(self) -> list[int]:
        """Token ids of the turns that leave room for an answer."""
        context = self.llm.config.max_position_embeddings
        limit = context - min(self.params.max_tokens, context // 2)
        return self._running_text(limit) if self.template is None else self._messages(self.template, limit)

    def _running_text(self, limit: int) -> list[int]:
        ids = self.tokenizer.encode(self.text())
        return [self.llm.config.bos_token_id, *ids[-(limit - 1) :]]

    def text(self) -> str:
        """The turns as one text, each on a line of its own."""
        lines = [turn.content if turn.content.endswith("\n") else turn.content + "\n" for turn in self.turns]
        return "".join(lines)

    def _messages(self, template: ChatTemplate, limit: int) -> list[int]:
        messages = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        ids = template.encode(messages)
        while len(ids) > limit and len(messages) > 2:
            messages = messages[2:]
            ids = template.encode(messages)
        return ids
