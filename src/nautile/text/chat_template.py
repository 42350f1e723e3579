"""A chat template turns messages into the one text, with special tokens, that a model was trained to continue.

It comes with the model, as a Jinja program, or is one of the built-in formats of `nautile.text.templates`. The model's
own always goes first.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nautile.core.errors import UserError
from nautile.core.json_file import read_json_object
from nautile.text.templates.choose import Choice, choose
from nautile.text.templates.messages import Conversation, Message, with_text
from nautile.text.templates.table import Format, format_named
from nautile.text.tokenizer import Tokenizer

_MODES = ("thinking", "enable_thinking")
"""Names under which published programs ask whether to think: DeepSeek's, and Qwen's."""


class ChatTemplate(Protocol):
    """Messages to token ids."""

    origin: str
    """Which template this is, and why this one."""
    end_ids: frozenset[int]
    """Tokens that end an answer besides the tokenizer's end-of-text token."""

    def render(
        self, messages: Sequence[Message], *, thinking: bool | None = None, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The text after which the model writes its answer.

        Args:
            messages: The turns so far.
            thinking: Ask for an answer with reasoning or without; None for the template's own way.
            tools: Functions that the model may call.

        Raises:
            UserError: The template does not accept these messages, or knows only one way of answering.
        """
        ...


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text, whose special tokens are meant as such."""
    return tokenizer.encode(text, parse_special=True)


class ProgramTemplate:
    """A template as published in tokenizer_config.json. It runs in Jinja's sandbox: it comes from a downloaded file.

    Args:
        source: The Jinja program.
        tokenizer: Names the beginning and end tokens that the program inserts.
        origin: Where the program stands.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, origin: str = "the model's own chat template") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        environment.filters["tojson"] = _tojson  # Jinja's own escapes for HTML
        functions = {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        self.origin, self.end_ids = origin, frozenset[int]()
        self._tokens = _bos_and_eos(tokenizer)
        try:
            self._template = environment.from_string(source, globals=functions)
            asked = meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise UserError(
                f"the chat template does not parse: {error}",
                "it turns messages into the text that the model was trained on",
                "correct chat_template in the model's tokenizer_config.json, or force a built-in one by its name",
            ) from error
        self._modes = asked & set(_MODES)
        self._takes_tools = "tools" in asked

    def render(
        self, messages: Sequence[Message], *, thinking: bool | None = None, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """As `ChatTemplate.render`."""
        if thinking is not None and not self._modes:
            raise _one_way(self.origin)
        if tools and not self._takes_tools:
            raise UserError(
                f"{self.origin} has no place for tools",
                "the model would not be told of them",
                "leave tools out, or describe them in the system message",
            )
        names: dict[str, Any] = {} if thinking is None else dict.fromkeys(_MODES, thinking)
        names["tools"] = list(tools) or None
        try:
            return self._template.render(
                messages=with_text(messages), add_generation_prompt=True, **self._tokens, **names
            )
        except (TemplateError, TypeError) as error:  # TypeError: a program that adds None to a text
            raise UserError(
                f"the model's chat template refused the messages: {error}",
                "templates expect certain roles in a certain order",
                "give user and assistant messages in turn, each with text as its content",
            ) from error


class _GenerationBlock(Extension):
    """``{% generation %}…{% endgeneration %}``: training programs mark with it what is scored. Here, only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class BuiltInTemplate:
    """One of the formats of `nautile.text.templates`.

    Args:
        name: Its name in the table.
        tokenizer: Names the beginning and end tokens.
        reason: Why this one.

    Raises:
        UserError: There is no format of this name.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, reason: str) -> None:
        self.format: Format = format_named(name)
        self.origin = f"the built-in chat template {name} ({reason})"
        ends = (tokenizer.token_id(token) for token in self.format.ends)
        self.end_ids = frozenset(token_id for token_id in ends if token_id is not None)
        self._tokens = _bos_and_eos(tokenizer)

    def render(
        self, messages: Sequence[Message], *, thinking: bool | None = None, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """As `ChatTemplate.render`."""
        if thinking is not None and not self.format.both_ways:
            raise _one_way(self.origin)
        bos, eos = self._tokens["bos_token"], self._tokens["eos_token"]
        return self.format.render(Conversation(messages, bos, eos, bool(thinking), tools))


def find_template(folder: Path | None, tokenizer: Tokenizer, name: str | None = None) -> ChatTemplate | None:
    """The template of a model; None for a base model.

    Args:
        folder: The model's files; None for one in memory.
        tokenizer: Its tokenizer.
        name: Force the built-in format of this name.

    Raises:
        UserError: The program there does not parse, or no built-in format has this name.
    """
    if name is not None:
        return BuiltInTemplate(name, tokenizer, "asked for")
    if program := tokenizer.settings.chat_template:
        return ProgramTemplate(program, tokenizer)
    choice = format_of(folder, tokenizer) if folder else Choice(None, "a model in memory")
    return BuiltInTemplate(choice.name, tokenizer, choice.reason) if choice.name else None


def format_of(folder: Path, tokenizer: Tokenizer) -> Choice:
    """Which published format the model in `folder` has, whether or not its own template is there, too."""
    file = folder / "config.json"
    published = read_json_object(file, "the model's family is read from it") if file.is_file() else {}
    return choose(folder, published, tokenizer.token_id, tokenizer.token(tokenizer.eos_id))


def _bos_and_eos(tokenizer: Tokenizer) -> dict[str, str]:
    return {"bos_token": tokenizer.token(tokenizer.bos_id), "eos_token": tokenizer.token(tokenizer.eos_id)}


def _one_way(origin: str) -> UserError:
    return UserError(
        f"{origin} knows only one way of answering",
        "whether to think is asked in the template, and this one does not ask",
        "leave the choice to the template: --thinking auto, thinking=None in Python",
    )


def _tojson(value: object, ensure_ascii: bool = False, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
