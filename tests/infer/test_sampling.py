import math

import pytest
import torch

from nautile.core.errors import UserError
from nautile.infer.sampling import Sampler, SamplingParams, next_token_probabilities


def test_top_p_keeps_the_shortest_prefix_that_reaches_it():
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    for top_p, kept in [
        (0.3, {1}),
        (0.4, {1}),
        (0.41, {1, 3}),
        (0.85, {1, 3, 4}),
        (0.9, {0, 1, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ]:
        got = next_token_probabilities(p.double().log(), 1.0, top_p - 1e-9)
        assert set(got.nonzero().flatten().tolist()) == kept, top_p
        whole = sum(float(p[i]) for i in kept)
        assert got.tolist() == pytest.approx([float(p[i]) / whole if i in kept else 0.0 for i in range(5)])


def test_top_p_is_never_empty_and_ties_keep_the_first():
    assert next_token_probabilities(torch.zeros(4), 1.0, 1e-9).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_top_k_keeps_the_most_likely_and_cuts_before_top_p():
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).double()
    cases = [(1, 1.0, {1}), (3, 1.0, {1, 3, 4}), (9, 1.0, {0, 1, 2, 3, 4}), (2, 0.61, {1}), (2, 0.62, {1, 3})]
    for top_k, top_p, kept in cases:  # of 0.4 and 0.25 the first is 0.615 of the two
        got = next_token_probabilities(p.log(), 1.0, top_p, top_k)
        whole = sum(float(p[i]) for i in kept)
        assert got.tolist() == pytest.approx([float(p[i]) / whole if i in kept else 0.0 for i in range(5)])
    assert next_token_probabilities(torch.zeros(4), 1.0, 1.0, 2).tolist() == [0.5, 0.5, 0.0, 0.0]


def test_top_k_and_top_p_agree_with_transformers():
    from transformers.generation import logits_process as theirs

    generator = torch.Generator().manual_seed(0)
    for top_k, top_p, temperature in [(5, 0.8, 0.7), (3, 0.99, 1.3), (40, 0.5, 0.6)]:
        logits = torch.randn(1, 50, generator=generator, dtype=torch.double)
        scores = theirs.TemperatureLogitsWarper(temperature)(None, logits)
        scores = theirs.TopPLogitsWarper(top_p)(None, theirs.TopKLogitsWarper(top_k)(None, scores))
        torch.testing.assert_close(
            next_token_probabilities(logits[0], temperature, top_p, top_k), scores.softmax(-1)[0]
        )


def test_the_sampler_draws_among_the_top_k():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    sampler = Sampler([SamplingParams(temperature=5.0, top_k=2, seed=0)], torch.device("cpu"))
    assert {sampler(logits, [0])[0] for _ in range(60)} == {2, 3}


def test_temperature_sharpens_without_overflow():
    logits = torch.tensor([1000.0, 999.0, -1000.0])
    assert next_token_probabilities(logits, 1.0)[1] == pytest.approx(1 / (1 + math.e))
    assert next_token_probabilities(logits, 0.5)[1] == pytest.approx(1 / (1 + math.e**2))
    assert next_token_probabilities(logits, 1e-300).tolist() == [1.0, 0.0, 0.0]


def test_draws_follow_the_distribution():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    sampler = Sampler([SamplingParams(temperature=0.7, top_p=0.9, seed=1)], torch.device("cpu"))
    n = 8000
    draws = torch.tensor([sampler(logits[None], [0])[0] for _ in range(n)])
    expected = next_token_probabilities(logits, 0.7, 0.9) * n
    counts = torch.bincount(draws, minlength=12).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_request_draws_alike_in_any_batch():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(seed=seed) for seed in (5, 6, 7)]
    together = Sampler(params, torch.device("cpu"))
    drawn = [together(logits, [0, 1, 2]) for _ in range(20)]
    for row, one in enumerate(params):
        alone = Sampler([one], torch.device("cpu"))
        assert [alone(logits[row : row + 1], [0])[0] for _ in range(20)] == [tokens[row] for tokens in drawn]


def test_greedy_ignores_the_seed_and_rows_may_differ_in_temperature():
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    sampler = Sampler([SamplingParams(temperature=0.0), SamplingParams(temperature=100.0, seed=0)], torch.device("cpu"))
    drawn = [sampler(logits, [0, 1]) for _ in range(50)]
    assert {greedy for greedy, _ in drawn} == {1}
    assert {hot for _, hot in drawn} == {0, 1, 2}


@pytest.mark.parametrize(
    "wrong",
    [
        *[{"max_tokens": value} for value in (0, None, 2.5, "16", True, math.inf)],
        *[{"temperature": value} for value in (-1.0, None, "hot", math.nan, math.inf, True)],
        *[{"top_p": value} for value in (0.0, 1.1, math.nan, None, torch.tensor(0.5))],
        *[{"top_k": value} for value in (-1, 0.5, None)],
        *[{"stop": value} for value in (("a", ""), 3, ["a", 5], [None], b"end")],
        *[{"seed": value} for value in (1.5, "1", -1, 2**64, False)],
        {"ignore_eos": None},
    ],
)
def test_impossible_params_are_refused(wrong):
    with pytest.raises(UserError, match="not possible"):
        SamplingParams(**wrong)


def test_one_stop_string_may_be_given_bare():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()


def test_numbers_of_other_libraries_are_numbers():
    numpy = pytest.importorskip("numpy")
    params = SamplingParams(max_tokens=numpy.int64(3), temperature=numpy.float32(0.5), top_k=numpy.int32(2))
    assert (params.max_tokens, params.temperature, params.top_k) == (3, 0.5, 2)
