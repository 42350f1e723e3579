"""Expert selection against loops over tokens, and the load balance mechanisms."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from nautile.layers.moe.balance import sequence_balance_loss, update_bias_
from nautile.layers.moe.router import Router, select


def router(**changes: object) -> Router:
    options = {
        "scoring_func": "sigmoid",
        "method": "noaux_tc",
        "n_group": 4,
        "topk_group": 2,
        "normalise": True,
        "scaling_factor": 2.5,
    }
    gate = Router(10, 12, 3, **{**options, **changes})
    gate.weight.data.normal_(generator=torch.Generator().manual_seed(4))
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias.normal_(-0.5, 0.4, generator=torch.Generator().manual_seed(6))
    return gate


def by_hand(gate: Router, x_D: torch.Tensor) -> dict[int, float]:
    """Expert → weight for one token, by sorting."""
    logits = [float(w @ x_D) for w in gate.weight.detach()]
    s = torch.tensor(logits).sigmoid() if gate.scoring_func == "sigmoid" else torch.tensor(logits).softmax(0)
    s = s.tolist()
    bias = gate.e_score_correction_bias
    c = s if bias is None else [a + float(b) for a, b in zip(s, bias, strict=True)]
    allowed = set(range(12))
    if gate.method != "greedy":
        members = [list(range(3 * g, 3 * g + 3)) for g in range(4)]
        best = {"noaux_tc": 2, "group_limited_greedy": 1}[gate.method]
        rank = [sum(sorted((c[e] for e in group), reverse=True)[:best]) for group in members]
        kept = sorted(range(4), key=lambda g: -rank[g])[:2]
        allowed = set(itertools.chain(*(members[g] for g in kept)))
    chosen = sorted(allowed, key=lambda e: -c[e])[:3]
    total = sum(s[e] for e in chosen) if gate.normalise else 1.0
    return {e: s[e] / total * gate.scaling_factor for e in chosen}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalise": False},
        {"scoring_func": "softmax", "method": "group_limited_greedy", "normalise": False, "scaling_factor": 16.0},
        {"scoring_func": "softmax", "method": "greedy", "scaling_factor": 1.0},
        {"method": "greedy", "n_group": 1, "topk_group": 1},
    ],
)
def test_selection_and_weights_equal_a_loop(changes: dict[str, object]) -> None:
    gate = router(**changes)
    x_BSD = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(1))
    routing = gate(x_BSD)
    counts = [0] * 12
    for t, x_D in enumerate(x_BSD.flatten(0, 1)):
        expected = by_hand(gate, x_D)
        got = dict(zip(routing.experts_TK[t].tolist(), routing.weights_TK[t].tolist(), strict=True))
        assert got == pytest.approx(expected, rel=1e-5)
        for e in expected:
            counts[e] += 1
    assert routing.counts_E.tolist() == counts


def test_bias_moves_the_choice_but_not_the_weights() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2]])
    bias = torch.tensor([-5.0, 0.0, 0.0, 0.0])
    assert set(select(scores, None, "noaux_tc", 2, 1, 1)[0].tolist()) == {0, 1}
    assert set(select(scores, bias, "noaux_tc", 2, 1, 1)[0].tolist()) == {1, 3}


def test_router_computes_in_float32_under_autocast() -> None:
    gate, x = router(), torch.randn(1, 5, 10, generator=torch.Generator().manual_seed(9))
    with torch.autocast("cpu", torch.bfloat16):
        routing = gate(x)
    torch.testing.assert_close(routing.weights_TK, gate(x).weights_TK, atol=0, rtol=0)


def test_bias_update_moves_against_the_load_and_evens_it() -> None:
    bias = torch.zeros(4)
    update_bias_(bias, torch.tensor([10, 0, 5, 5]), speed=0.001)
    assert bias.tolist() == pytest.approx([-0.001, 0.001, 0.0, 0.0])
    gate = router(n_group=1, topk_group=1, scaling_factor=1.0)
    x = torch.randn(4, 64, 10, generator=torch.Generator().manual_seed(3)) + 0.7
    before = gate(x).counts_E
    for _ in range(2000):
        update_bias_(gate.e_score_correction_bias, gate(x).counts_E, speed=0.003)
    after = gate(x).counts_E
    assert before.max() > 1.8 * before.float().mean()
    assert after.max() < 1.15 * after.float().mean()


def test_balance_loss_equals_the_formula_and_has_its_minimum_at_balance() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 20, 6, generator=generator)
    experts = scores.topk(2).indices
    expected = 0.0
    for b in range(3):
        share = scores[b] / scores[b].sum(-1, keepdim=True)
        for i in range(6):
            f = 6 / (2 * 20) * float((experts[b] == i).sum())
            expected += f * float(share[:, i].mean()) / 3
    assert float(sequence_balance_loss(scores, experts)) == pytest.approx(expected, rel=1e-5)
    even = F.one_hot(torch.arange(12) % 6, 6)[None].float()
    assert float(sequence_balance_loss(even, even.topk(1).indices)) == pytest.approx(1.0)
    assert expected > 1.0


def test_balance_loss_only_in_training() -> None:
    gate, x = router(), torch.zeros(1, 3, 10)
    assert gate.train()(x).balance_loss is not None
    assert gate.eval()(x).balance_loss is None


def test_the_balance_loss_looks_at_sequences_or_at_the_batch() -> None:
    """`seq_aux`: two sequences that each use half of the experts balance each other only in the batch."""
    x = torch.eye(4).repeat_interleave(5, 0).view(2, 10, 4) * 30
    losses = []
    for sequence_balance in (True, False):
        gate = Router(
            4,
            4,
            1,
            scoring_func="softmax",
            method="greedy",
            normalise=False,
            scaling_factor=1.0,
            sequence_balance=sequence_balance,
        )
        torch.nn.init.eye_(gate.weight)
        losses.append(float(gate.train()(x).balance_loss.detach()))
    assert losses == pytest.approx([2.0, 1.0], abs=1e-4)
