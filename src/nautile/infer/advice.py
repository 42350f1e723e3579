"""What a model's publisher says about sampling, for the folders whose generation_config.json does not."""

from pathlib import Path

from nautile.infer.defaults import Defaults
from nautile.text.chat_template import format_of
from nautile.text.templates.table import FORMATS
from nautile.text.tokenizer import Tokenizer


def publishers_advice(folder: Path | None, tokenizer: Tokenizer | None, chat_template: str | None = None) -> Defaults:
    """The recommendation for the published model that this is; nothing where that cannot be told.

    Args:
        folder: The model's files; None for one in memory.
        tokenizer: Its tokenizer.
        chat_template: The built-in template that was forced: its models' publisher is asked.
    """
    name = chat_template
    if name is None and folder is not None and tokenizer is not None:
        name = format_of(folder, tokenizer).name
    return Defaults(FORMATS[name].sampling, FORMATS[name].source) if name else Defaults()
