"""Which tokenizer a run uses."""

from dataclasses import dataclass
from pathlib import Path

from nautile.core.errors import UserError

SMALLEST_VOCABULARY = 256 + 10
"""Every byte, and the special tokens: with these alone any text can be written."""
MISSING_ROWS = 0.03
"""Part of a model's vocabulary that its tokenizer may lack: published models round the embedding up (V2 by 2.3 %)."""


def belongs(ids: int, rows: int) -> bool:
    """Whether a tokenizer with so many ids can be that of a model whose embedding has so many rows."""
    return rows * (1 - MISSING_ROWS) <= ids <= rows


@dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer trained on the corpus, or an existing one."""

    vocab_size: int = 4096
    """Number of token ids, exactly; the model's vocab_size. With `path`: the most ids that tokenizer may have."""
    path: str = ""
    """Existing tokenizer.json, or a folder that holds one, to use as it is; empty to train one on the corpus."""
    train_megabytes: float = 16.0
    """Text that the tokenizer is trained on, drawn evenly from the training split (V3's: about 24 GB)."""

    def check(self) -> None:
        """Raise `UserError` if a field cannot be met."""
        if not self.path and self.vocab_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"tokenizer: vocab_size {self.vocab_size} is too small",
                f"256 bytes and the special tokens take {SMALLEST_VOCABULARY} ids before anything is learnt",
                f"use at least {SMALLEST_VOCABULARY}, e.g. 4096",
            )
        if self.train_megabytes <= 0:
            raise UserError(
                f"tokenizer: train_megabytes {self.train_megabytes} is not possible",
                "a tokenizer learns from some text",
                "use a positive number, e.g. 16",
            )
        if self.path and not Path(self.path).exists():
            raise UserError(
                f"tokenizer: {self.path} does not exist",
                "it should be a tokenizer.json or a folder that holds one",
                "correct tokenizer.path, or leave it empty to train a tokenizer on the corpus",
            )
