"""Turns of a conversation, and the part of them that fits the model's context."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from nautile.infer.llm import LLM
from nautile.infer.params import SamplingParams
from nautile.infer.prompt import ChatPrompt, beginning, needs_tokenizer
from nautile.text.templates.messages import Message
from nautile.text.thinking import Piece


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: Literal["user", "assistant"]
    content: str


class Conversation:
    """Remembers what was said and asks the model for the next turn.

    With a chat template the turns become messages, and of an answer with reasoning only what follows the reasoning is
    remembered. Without one the model is a base model: the turns are one running text that it continues. When the turns
    outgrow the context, the oldest are left out: whole exchanges of messages, or the beginning of the running text.

    Args:
        llm: The model, with its chat template.
        params: How to sample each turn.
        thinking: Ask for answers with reasoning or without; None for the template's own way.
    """

    def __init__(self, llm: LLM, params: SamplingParams, thinking: bool | None = None) -> None:
        self.llm, self.params, self.thinking = llm, params, thinking
        self.tokenizer = needs_tokenizer(llm.tokenizer, "a conversation")
        self.turns: list[Turn] = []

    def reply(self, line: str) -> Generator[Piece]:
        """Say `line`; yields the model's turn in pieces. A turn that is broken off is remembered as far as it came."""
        self.turns.append(Turn("user", line))
        said: list[str] = []
        try:
            for piece in self._pieces():
                if not piece.reasoning:
                    said.append(piece.text)
                yield piece
        except BaseException:
            if not said:  # nothing was said in return, so nothing was said
                self.turns.pop()
            raise
        else:
            if not said and self.llm.template is not None:  # templates want sides to alternate
                self.turns.append(Turn("assistant", ""))
        finally:
            if said:
                self.turns.append(Turn("assistant", "".join(said)))

    def reset(self) -> None:
        """Forget everything."""
        self.turns.clear()

    def prompt(self) -> ChatPrompt:
        """Token ids of the turns that leave room for an answer."""
        return self._running_text() if self.llm.template is None else self._prompt_of(self._messages())

    def text(self) -> str:
        """The turns as one text, each on a line of its own."""
        lines = [turn.content if turn.content.endswith("\n") else turn.content + "\n" for turn in self.turns]
        return "".join(lines)

    def _pieces(self) -> Generator[Piece]:
        if self.llm.template is None:  # a base model's <think> is text like any other
            yield from map(Piece, self.llm.stream(self.prompt().ids, self.params))
        else:
            yield from self.llm.chat_stream(self._messages(), self.params, thinking=self.thinking)

    def _limit(self) -> int:
        context = self.llm.config.max_position_embeddings
        return context - min(self.params.max_tokens, context // 2)

    def _running_text(self) -> ChatPrompt:
        first = beginning(self.tokenizer)
        ids = self.tokenizer.encode(self.text())
        return ChatPrompt([*first, *ids[-(self._limit() - len(first)) :]], thinking=False)

    def _messages(self) -> list[Message]:
        messages: list[Message] = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        while len(messages) > 2 and len(self._prompt_of(messages).ids) > self._limit():
            messages = messages[2:]
        return messages

    def _prompt_of(self, messages: list[Message]) -> ChatPrompt:
        return self.llm.chat_prompt(messages, thinking=self.thinking)
