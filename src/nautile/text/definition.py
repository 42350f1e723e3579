"""tokenizer.json, the tokenizers library's file: which of them are read here, and what in them is markup."""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from nautile.core.errors import UserError


def read_definition(definition: str, where: str) -> dict[str, Any]:
    """Fields of a tokenizer.json.

    Raises:
        UserError: It is none of a byte-level BPE tokenizer; `where` names it.
    """
    try:
        fields = json.loads(definition)
        kind, decoder = fields["model"]["type"], json.dumps(fields["decoder"])
    except (json.JSONDecodeError, KeyError, TypeError):
        kind, decoder, fields = "unknown", "", {}
    if kind != "BPE" or '"ByteLevel"' not in decoder:
        raise UserError(
            f"{where} is not a byte-level BPE tokenizer",
            "nautile reads the tokenizer.json that DeepSeek, Llama 3 and Qwen models come with",
            "choose another tokenizer, or leave tokenizer.path empty to train one on the corpus",
        )
    return fields


def without_markup(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The same tokenizer without its markup tokens, so that it cannot mistake text for one of them.

    DeepSeek-LLM's and the first Coder's tokenizers add 13 letters (``ü``, ``ö``, ``ú``, ``ø``, …) that are no markup:
    their models read and write these letters as those ids. Decoders of the tokenizers library show U+FFFD for them
    (huggingface/tokenizers#1392, DeepSeek-Coder#88); `Tokenizer.decode` shows the letters.
    """
    letters = [token for token in fields["added_tokens"] if not token["special"] and _is_letter(token["content"])]
    kept = {token["content"] for token in letters}
    # The library numbers added tokens anew unless the vocabulary knows them; a NUL makes the others unreachable.
    names = {t["content"] if t["content"] in kept else "\0" + t["content"]: t["id"] for t in fields["added_tokens"]}
    vocab = {**fields["model"]["vocab"], **(names if letters else {})}
    plain = {**fields, "model": {**fields["model"], "vocab": vocab}, "added_tokens": letters, "post_processor": None}
    return tokenizers.Tokenizer.from_str(json.dumps(plain))


def _is_letter(name: str) -> bool:
    return len(name) == 1 and not name.isascii()
