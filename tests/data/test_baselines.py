import math
from collections import Counter

import numpy as np
import pytest

from nautile.core.errors import UserError
from nautile.data.baselines import DISCOUNTS, Bigrams, bigram_bits_per_byte, unigram_bits_per_byte

V = 12


def markov_stream(rng, length):
    """Each token is mostly followed by a fixed other one."""
    tokens = [0]
    for _ in range(length - 1):
        tokens.append((tokens[-1] * 5 + 1) % V if rng.random() < 0.8 else int(rng.integers(V)))
    return tokens


def kneser_ney(train, a, b, discount):
    """The formula of the module, by counting."""
    pairs = Counter(zip(train, train[1:], strict=False))
    followed = sum(n for (x, _), n in pairs.items() if x == a)
    successors = sum(1 for x, _ in pairs if x == a)
    lower = (sum(1 for _, y in pairs if y == b) + 1) / (len(pairs) + V)
    if followed == 0:
        return lower
    return max(pairs[a, b] - discount, 0) / followed + discount * successors / followed * lower


def test_bigram_probabilities_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    train = markov_stream(rng, 60)
    train = [token for token in train if token != 7]  # a token that training never saw
    scored = [*rng.integers(V, size=30).tolist(), 7, 3, 7, 7]
    got = Bigrams.count(np.array(train), V).probabilities(np.array(scored), 0.7)
    expected = [kneser_ney(train, a, b, 0.7) for a, b in zip(scored, scored[1:], strict=False)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("before", range(V))
def test_bigram_probabilities_add_up_to_one(before):
    bigrams = Bigrams.count(np.array(markov_stream(np.random.default_rng(1), 50)), V)
    pairs = np.array([[before, after] for after in range(V)]).ravel()
    assert bigrams.probabilities(pairs, 0.6)[::2].sum() == pytest.approx(1)


def test_bits_are_divided_by_the_bytes_of_the_scored_tokens(write_shards):
    train, validation = write_shards([[0, 1, 2, 3, 1, 2]], V), write_shards([[3, 1, 2], [3, 3]], V)
    counts = {0: 1, 1: 2, 2: 2, 3: 1}
    bits = -sum(math.log2((counts[token] + 1) / (6 + V)) for token in [1, 2, 3, 3])
    assert unigram_bits_per_byte(train, validation, V) == pytest.approx(bits / (1 + 2 + 3 + 3))
    bits = -sum(math.log2((counts[token] + 1) / (6 + V)) for token in [1, 2])
    assert unigram_bits_per_byte(train, validation, V, targets=2) == pytest.approx(bits / (1 + 2))


def test_bigram_is_near_the_entropy_of_its_source_and_below_unigram(write_shards):
    rng = np.random.default_rng(2)
    train = write_shards([markov_stream(rng, 20_000)], V, 10**6)
    validation = write_shards([markov_stream(rng, 5_000)], V, 10**6)
    likely, other = 0.8 + 0.2 / V, 0.2 / V
    entropy = -likely * math.log2(likely) - (V - 1) * other * math.log2(other)
    per_target = bigram_bits_per_byte(train, validation, V) * validation.num_bytes / (validation.num_tokens - 1)
    assert per_target == pytest.approx(entropy, rel=0.03)
    assert bigram_bits_per_byte(train, validation, V) < unigram_bits_per_byte(train, validation, V)


def test_the_discount_is_chosen_without_the_held_out_text(write_shards, monkeypatch):
    rng = np.random.default_rng(3)
    train = write_shards([markov_stream(rng, 400)], V, 10**6)
    used = []
    probabilities = Bigrams.probabilities

    def noting(self, tokens, discount):
        used.append((len(tokens), discount))
        return probabilities(self, tokens, discount)

    monkeypatch.setattr(Bigrams, "probabilities", noting)
    for tokens in ([1, 2, 3, 4, 5], [5, 5, 5, 5, 5, 5]):
        bigram_bits_per_byte(train, write_shards([tokens], V), V)
    tried, final = used[: len(DISCOUNTS)], used[len(DISCOUNTS)]
    assert {length for length, _ in tried} == {20}
    assert final[1] == used[-1][1]


def test_nothing_to_score_is_a_sentence(write_shards):
    train = write_shards([[1, 2, 3]], V)
    for tokens in ([1], [1, 0]):  # no target; a target without bytes
        with pytest.raises(UserError, match="no text to score"):
            bigram_bits_per_byte(train, write_shards([tokens], V), V)
