"""The chat template that comes with a model: a Jinja program that turns messages into one text with special tokens."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nautile.core.errors import UserError
from nautile.text.tokenizer import Tokenizer

Message = Mapping[str, str]
"""``{"role": "user", "content": "..."}``."""


class ChatTemplate:
    """A template as published in tokenizer_config.json. It runs in Jinja's sandbox: it comes from a downloaded file.

    Args:
        source: The Jinja program.
        tokenizer: Names the beginning and end tokens that the program inserts.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        functions = {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        self._tokenizer = tokenizer
        try:
            self._template = environment.from_string(source, globals=functions)
        except TemplateError as error:
            raise UserError(
                f"the chat template does not parse: {error}",
                "it turns messages into the text that the model was trained on",
                "correct chat_template in the model's tokenizer_config.json, or remove it to continue plain text",
            ) from error

    @classmethod
    def load(cls, folder: Path | str, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """The template in a model folder; None where there is none, as with base models."""
        folder = Path(folder)
        program, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        if program.is_file():
            return cls(program.read_text("utf-8"), tokenizer)
        source = json.loads(config.read_text("utf-8")).get("chat_template") if config.is_file() else None
        if isinstance(source, list):  # several named ones
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        return cls(source, tokenizer) if source else None

    def render(self, messages: Sequence[Message]) -> str:
        """The text after which the model writes its answer.

        Raises:
            UserError: The template does not accept these messages.
        """
        names = {"bos_token": self._tokenizer.bos_id, "eos_token": self._tokenizer.eos_id}
        tokens = {name: self._tokenizer.token(token_id) for name, token_id in names.items()}
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **tokens)
        except TemplateError as error:
            raise UserError(
                f"the model's chat template refused the messages: {error}",
                "templates expect certain roles in a certain order",
                "start again with /reset",
            ) from error

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of `render`, whose special tokens are meant as such."""
        return self._tokenizer.encode(self.render(messages), parse_special=True)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
