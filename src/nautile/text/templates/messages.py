"""What every built-in template takes: messages in the form that the usual chat APIs share."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nautile.core.errors import UserError
from nautile.core.nearest import suggestion

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``; an assistant's may hold ``reasoning_content`` and ``tool_calls``."""
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """What is rendered: the turns so far, and how the next one is to begin."""

    messages: Sequence[Message]
    """Turns, oldest first."""
    bos: str
    """Text of the token that begins a document."""
    eos: str
    """Text of the token that ends an answer."""
    thinking: bool = False
    """Begin the answer with reasoning, where the format has both ways."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions the model may call, ``{"type": "function", "function": {"name": ..., ...}}`` each."""

    def __post_init__(self) -> None:
        for message in self.messages:
            if message.get("role") not in ROLES:
                raise UserError(
                    f"a message has the role {message.get('role')!r}",
                    "a chat template gives each role its own place",
                    suggestion(str(message.get("role")), ROLES, "roles"),
                )


def check_messages(messages: Sequence[Message]) -> None:
    """Raise `UserError` if `messages` are none: Jinja would render a text of nothing from them."""
    listed = [] if isinstance(messages, str | Mapping) else list(messages)
    if not listed or not all(isinstance(message, Mapping) and "role" in message for message in listed):
        raise UserError(
            f"{str(messages)[:60]!r} is no conversation",
            "messages are a list of at least one",
            '[{"role": "user", "content": "Hello"}]',
        )


def content(message: Message) -> str:
    """A message's text; nothing where only tools were called. Parts of text are joined line by line, as vLLM does.

    Raises:
        UserError: It is not text.
    """
    text = message.get("content")
    if text is None:
        return ""
    if isinstance(text, str):
        return text
    if isinstance(text, list | tuple):
        return "\n".join(_text_of(part, message) for part in text)
    raise UserError(
        f"the content of a {message.get('role')} message is a {type(text).__name__}",
        "text models read text",
        'give a string, or a list of {"type": "text", "text": "..."}',
    )


def with_text(messages: Sequence[Message]) -> list[Message]:
    """The same messages, contents that are lists of parts made one text: published programs add strings to them."""
    return [
        {**message, "content": content(message)} if isinstance(message.get("content"), list | tuple) else message
        for message in messages
    ]


def _text_of(part: object, message: Message) -> str:
    if isinstance(part, str):
        return part
    fields = part if isinstance(part, Mapping) else {}
    if fields.get("type") == "text" and isinstance(fields.get("text"), str):
        return str(fields["text"])
    kind = repr(fields["type"]) if "type" in fields else type(part).__name__
    raise UserError(
        f"a {message.get('role')} message has a part of type {kind}",
        "text models read text",
        'leave it out, or give {"type": "text", "text": "..."}',
    )


def system_prompt(messages: Sequence[Message]) -> str:
    """All system messages as one text, an empty line between them: V3's templates put it first wherever it stood."""
    return "\n\n".join(content(message) for message in messages if message["role"] == "system")


def calls(message: Message) -> list[Mapping[str, Any]]:
    """The functions that an assistant's message called: ``{"name": ..., "arguments": JSON text or mapping}`` each."""
    return [call["function"] for call in message.get("tool_calls") or ()]


def as_json(value: object) -> str:
    """JSON as the published templates write it: separators with spaces, characters as they are."""
    return json.dumps(value, ensure_ascii=False)


def refuse_tools(conversation: Conversation, name: str) -> None:
    """Raise `UserError` if tools are offered or were used in a format without a place for them."""
    used = any(message["role"] == "tool" or calls(message) for message in conversation.messages)
    if conversation.tools or used:
        raise UserError(
            f"the {name} chat template has no place for tools",
            "the model was not trained on any form of them",
            "leave tools out, or use a model whose template has them: V3, V3.1, V3.2",
        )
