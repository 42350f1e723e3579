"""From what a person gives to token ids that the model can read, and the reasons why it sometimes cannot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from nautile.core.errors import UserError
from nautile.models.config import DecoderConfig
from nautile.text.chat_template import ChatTemplate, encode
from nautile.text.config import belongs
from nautile.text.fim import psm_prompt
from nautile.text.templates.messages import Message, check_messages
from nautile.text.thinking import opened_by
from nautile.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids, which are fed as they are."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, whether one or several were given: a flat list of ids is one prompt.

    Raises:
        UserError: Something else than text or lists, such as a tensor.
    """
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = _listed(prompts, "the prompts are")
    return [items] if items and all(map(_is_id, items)) else items


def check_vocabulary(tokenizer: Tokenizer | None, config: DecoderConfig) -> None:
    """Refuse a tokenizer that belongs to another model; none at all is fine.

    Raises:
        UserError: It has ids without an embedding, or far fewer ids than the embedding has rows.
    """
    if tokenizer is None:
        return
    ids, rows = tokenizer.vocab_size, config.vocab_size
    if belongs(ids, rows):
        return
    raise UserError(
        f"the tokenizer has {ids} token ids, the model's embedding {rows} rows",
        "some ids would have no embedding" if ids > rows else "the model was trained with another tokenizer",
        "use the tokenizer.json that came with the model",
    )


def to_token_ids(prompt: str | Sequence[int], tokenizer: Tokenizer | None, config: DecoderConfig) -> list[int]:
    """What the model is fed: text as its tokenizer is meant to begin it, token ids as they are.

    An empty prompt of either kind is the begin-of-sentence token alone.

    Raises:
        UserError: Text without a tokenizer, an id without an embedding, an empty prompt where nothing begins a text, or
            something that is neither text nor a list of ids.
    """
    if isinstance(prompt, str):
        encoder = needs_tokenizer(tokenizer, "a text prompt")
        return [*beginning(encoder), *encoder.encode(prompt)] or [encoder.bos_id]
    ids = _listed(prompt, "a prompt is")
    for item in ids:
        if not _is_id(item):
            raise _no_prompt(f"a prompt holds {str(item)[:40]!r}, which is of type {type(item).__name__}")
    unknown = [token_id for token_id in ids if not 0 <= token_id < config.vocab_size]
    if unknown:
        raise UserError(
            f"token id {unknown[0]} is not in the vocabulary",
            f"the model's ids go from 0 to {config.vocab_size - 1}",
            "encode the prompt with the model's own tokenizer",
        )
    if ids:
        return [int(token_id) for token_id in ids]
    first = config.bos_token_id if tokenizer is None else tokenizer.bos_id
    if first is None:
        raise UserError("the prompt is empty", "this model has no token that begins a text", "give at least one token")
    return [first]


def to_middle_prompt(prefix: str, suffix: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids after which a model trained on fill-in-the-middle writes what belongs between prefix and suffix.

    Raises:
        UserError: The tokenizer has no tokens for it.
    """
    around = psm_prompt(tokenizer.encode(prefix), tokenizer.encode(suffix), tokenizer)
    return [*beginning(tokenizer), *around]


def beginning(tokenizer: Tokenizer) -> list[int]:
    """What stands before the first token of a text: the begin-of-sentence token where the tokenizer is meant to add it.

    Llama and V3 do, Qwen2 does not. Chat templates write it themselves.
    """
    return [tokenizer.bos_id] if tokenizer.adds_bos else []


@dataclass(frozen=True)
class ChatPrompt:
    """Messages as the model reads them."""

    ids: list[int]
    """Token ids after which it answers."""
    thinking: bool
    """The prompt has opened the reasoning: the answer begins inside it."""


def to_chat_prompt(
    messages: Sequence[Message],
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> ChatPrompt:
    """Token ids of a conversation; its special tokens, the one that begins the text among them, are the template's.

    Raises:
        UserError: A base model, which has no template, or messages that the template does not accept.
    """
    if template is None:
        raise UserError(
            "this is a base model without a chat template",
            "it continues text and knows of no messages",
            "give the text to generate, or name the built-in template that it was trained on",
        )
    check_messages(messages)
    text = template.render(messages, thinking=thinking, tools=tools)
    return ChatPrompt(encode(tokenizer, text), opened_by(text))


def needs_tokenizer(tokenizer: Tokenizer | None, purpose: str) -> Tokenizer:
    """The tokenizer.

    Raises:
        UserError: There is none.
    """
    if tokenizer is not None:
        return tokenizer
    raise UserError(
        f"{purpose} needs a tokenizer, and this model has none",
        "there is no tokenizer.json beside its weights",
        "put the model's tokenizer.json there, or work with lists of token ids",
    )


def room_after(prompt: Sequence[int], context: int) -> int:
    """Tokens that still fit behind the prompt.

    Raises:
        UserError: None does.
    """
    if len(prompt) < context:
        return context - len(prompt)
    raise UserError(
        f"the prompt has {len(prompt)} tokens",
        f"the model's context is {context} tokens, and the answer must fit, too",
        f"shorten the prompt to at most {context - 1} tokens",
    )


def _is_id(item: object) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def _listed(items: object, what: str) -> list[Any]:
    if isinstance(items, Sequence) and not isinstance(items, str | bytes | bytearray):
        return list(items)
    raise _no_prompt(f"{what} of type {type(items).__name__}")


def _no_prompt(what: str) -> UserError:
    return UserError(
        what, "a prompt is a text or a list of token ids", "give str or list[int]; .tolist() makes lists of a tensor"
    )
