"""What counting alone achieves, in bits per byte on the held-out text: the figures a trained model has to beat.

Bits per byte do not depend on the tokenizer: the negative log-probabilities (base 2) of the scored tokens, divided by
the UTF-8 bytes that these tokens stand for. A model scored on the same targets is divided by the same bytes.

The bigram is interpolated Kneser-Ney (Ney, Essen, Kneser 1994) with one discount d:

    p(b | a) = max(c(a b) − d, 0) / c(a)  +  d · n(a ·) / c(a) · p₁(b)

c counts training tokens, n(a ·) the different tokens seen after a, and p₁ is the add-one estimate over n(· b), the
different tokens seen before b. d is chosen on the last part of the training split, counted on the rest of it; the
held-out text has no say.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nautile.core.errors import UserError
from nautile.data.shards import TokenShards

Ids = NDArray[np.int64]

MOST_TOKENS = 50_000_000
"""Training tokens counted at most: sorting the pairs of these takes about 2 GB and half a minute."""
DISCOUNTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Candidates for d."""
TUNING_SHARE = 0.05
"""Part of the training tokens on which d is chosen."""


def unigram_bits_per_byte(
    train: TokenShards, validation: TokenShards, vocab_size: int, targets: int | None = None
) -> float:
    """Bits per byte of add-one token frequencies.

    Args:
        train: Split that is counted.
        validation: Split that is scored, from its second token on: the first has nothing before it to predict it from.
        vocab_size: Number of ids V.
        targets: How many tokens to score; None for all. Windows of W tokens score W - 1 each.

    Raises:
        UserError: there is nothing to score.
    """
    scored = _scored(validation, targets)
    counts = np.bincount(_counted(train), minlength=vocab_size) + 1.0
    return _bits_per_byte(counts[scored[1:]] / counts.sum(), validation, scored)


def bigram_bits_per_byte(
    train: TokenShards, validation: TokenShards, vocab_size: int, targets: int | None = None
) -> float:
    """Bits per byte of the interpolated bigram above; arguments as in `unigram_bits_per_byte`."""
    scored = _scored(validation, targets)
    tokens = _counted(train)
    split = int(len(tokens) * (1 - TUNING_SHARE))
    rest = Bigrams.count(tokens[:split], vocab_size)
    discount = min(DISCOUNTS, key=lambda d: -np.log(rest.probabilities(tokens[split:], d)).sum())
    probabilities = Bigrams.count(tokens, vocab_size).probabilities(scored, discount)
    return _bits_per_byte(probabilities, validation, scored)


@dataclass(frozen=True)
class Bigrams:
    """Counts of adjacent tokens; only pairs that occur are stored, so V may be large."""

    vocab_size: int
    """Number of ids V."""
    pairs: Ids
    """int64 [P], sorted: a · V + b of every pair that occurs."""
    pair_counts: Ids
    """int64 [P]: c(a b)."""

    @classmethod
    def count(cls, tokens: Ids, vocab_size: int) -> "Bigrams":
        """Count the adjacent pairs of `tokens`."""
        return cls(vocab_size, *np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True))

    def probabilities(self, tokens: Ids, discount: float) -> NDArray[np.float64]:
        """float64 [N - 1]: p of each of the N `tokens` after the one before it."""
        V = self.vocab_size
        before, after = self.pairs // V, self.pairs % V
        followed = np.bincount(before, weights=self.pair_counts, minlength=V)  # c(a)
        successors = np.bincount(before, minlength=V)  # n(a ·)
        continuations = np.bincount(after, minlength=V) + 1.0  # n(· b), add-one
        a, b = tokens[:-1], tokens[1:]
        lower = continuations[b] / continuations.sum()
        counts = followed[a]
        seen = np.maximum(counts, 1)
        kept = np.maximum(self._count_of(a * V + b) - discount, 0) / seen
        # After a token that training never saw, nothing is kept and everything is left to p₁.
        left = np.where(counts > 0, discount * successors[a] / seen, 1.0)
        return kept + left * lower

    def _count_of(self, wanted: Ids) -> Ids:
        if len(self.pairs) == 0:
            return np.zeros_like(wanted)
        at = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        return np.where(self.pairs[at] == wanted, self.pair_counts[at], 0)


def _counted(train: TokenShards) -> Ids:
    return train.window(0, min(train.num_tokens, MOST_TOKENS))


def _scored(validation: TokenShards, targets: int | None) -> Ids:
    available = validation.num_tokens - 1
    return validation.window(0, 1 + (available if targets is None else min(targets, available)))


def _bits_per_byte(probabilities: NDArray[np.float64], validation: TokenShards, scored: Ids) -> float:
    num_bytes = validation.count_bytes(scored[1:])
    if num_bytes == 0:
        raise UserError(
            f"{validation.folder} holds no text to score",
            "the held-out tokens that would be scored stand for no bytes",
            "hold out more: raise data.validation-fraction",
        )
    return float(-np.log2(probabilities).sum() / num_bytes)
