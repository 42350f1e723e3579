"""From what a person gives to token ids that the model can read, and the reasons why it sometimes cannot."""

from collections.abc import Sequence

from nautile.core.errors import UserError
from nautile.models.config import DecoderConfig
from nautile.text.config import belongs
from nautile.text.fim import psm_prompt
from nautile.text.tokenizer import Tokenizer


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
    """What the model is fed: text behind the begin-of-sentence token, token ids as they are.

    An empty prompt of either kind is the begin-of-sentence token alone.

    Raises:
        UserError: Text without a tokenizer, or an id without an embedding.
    """
    if isinstance(prompt, str):
        return [config.bos_token_id, *needs_tokenizer(tokenizer, "a text prompt").encode(prompt)]
    unknown = [token_id for token_id in prompt if not 0 <= token_id < config.vocab_size]
    if unknown:
        raise UserError(
            f"token id {unknown[0]} is not in the vocabulary",
            f"the model's ids go from 0 to {config.vocab_size - 1}",
            "encode the prompt with the model's own tokenizer",
        )
    return list(prompt) or [config.bos_token_id]


def to_middle_prompt(prefix: str, suffix: str, tokenizer: Tokenizer, config: DecoderConfig) -> list[int]:
    """Token ids after which a model trained on fill-in-the-middle writes what belongs between prefix and suffix.

    Raises:
        UserError: The tokenizer has no tokens for it.
    """
    return [config.bos_token_id, *psm_prompt(tokenizer.encode(prefix), tokenizer.encode(suffix), tokenizer)]


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
