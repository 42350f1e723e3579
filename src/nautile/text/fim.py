"""Fill-in-the-middle: a document rearranged so that predicting the next token means filling a gap.

Prefix-suffix-middle (PSM; DeepSeek-Coder, arXiv 2401.14196, §3.1; V3 paper, arXiv 2412.19437, §4.1):

    <｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle

The document is cut between characters, before it is tokenised, so that the model also meets gaps that begin inside a
word, as they do under a programmer's cursor.
"""

import random
from dataclasses import dataclass

from nautile.core.errors import UserError
from nautile.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Cut:
    """A text in three parts; ``prefix + middle + suffix`` is the text."""

    prefix: str
    middle: str
    suffix: str


def chosen(key: str, rate: float) -> bool:
    """Whether the document called `key` is one of the share `rate` that is rearranged; always the same answer."""
    return random.Random(f"chosen {key}").random() < rate


def cut(text: str, key: str) -> Cut:
    """Cut `text` at two uniformly drawn places between characters; the same `key` always draws the same places."""
    chance = random.Random(f"cut {key}")
    start, end = sorted(chance.randint(0, len(text)) for _ in range(2))
    return Cut(text[:start], text[start:end], text[end:])


def psm_prompt(prefix: list[int], suffix: list[int], tokenizer: Tokenizer) -> list[int]:
    """Everything before the middle: what a model completes to fill the gap between the token ids given.

    Raises:
        UserError: the tokenizer has no fill-in-the-middle tokens.
    """
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    if begin is None or hole is None or end is None:
        raise UserError(
            "this tokenizer has no fill-in-the-middle tokens",
            "the gap's place is marked by tokens that the model learnt in training",
            "use a model trained with them, or set data.fim-rate to 0",
        )
    return [begin, *prefix, hole, *suffix, end]


def to_psm(prefix: list[int], middle: list[int], suffix: list[int], tokenizer: Tokenizer) -> list[int]:
    """The token ids of a cut document in PSM order, without a beginning or end token."""
    return [*psm_prompt(prefix, suffix, tokenizer), *middle]
