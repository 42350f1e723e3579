"""The indexer's loss against loops in float64, forward and backward, over everything and over a selection."""

import math

import pytest
import torch
from ops_cases import skip_unless_it_takes
from torch import Tensor

from nautile import ops
from nautile.ops.cpu import indexer_loss as cpu_loss
from nautile.ops.dispatch import TABLE

BACKENDS = TABLE["indexer_kl"][1]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few queries and of one head, so that small inputs take several, the last one partial."""
    from nautile.ops.triton import indexer_loss as triton_loss

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(cpu_loss, "PAIRS", 60)
    monkeypatch.setattr(cpu_loss, "PROBABILITIES", 30)
    monkeypatch.setattr(triton_loss, "PAIRS", 80)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(B: int, S: int, J: int, width: int, H: int, Q: int, which: str = "all") -> tuple:
    selected = documents = None
    if which == "selected":
        selected = torch.rand(B, S, S, generator=torch.Generator().manual_seed(4)) < 0.4
        selected[:, 1] = False  # sees nothing
    if which == "documents":
        documents = torch.arange(B * S).view(B, S) // 5
    index = (normal(B, S, J, width), normal(B, S, width, seed=1), normal(B, S, J, seed=2))
    return *index, normal(B, S, H, Q, seed=3), normal(B, S, H, Q, seed=5), 0.6, selected, documents


def naive(index_q, index_k, weights, q, k, scale, selected, documents) -> Tensor:
    total = (0 * index_q).sum()
    B, S, J, _ = index_q.shape
    H = q.shape[2]
    for b in range(B):
        for s in range(S):
            places = [t for t in range(s + 1) if selected is None or selected[b, s, t]]
            places = [t for t in places if documents is None or documents[b, s] == documents[b, t]]
            if not places:
                continue
            p = torch.zeros(len(places), dtype=q.dtype)
            for h in range(H):
                dots = [math.exp(scale * float(q[b, s, h] @ k[b, t, h])) for t in places]
                p = p + torch.tensor(dots, dtype=q.dtype) / sum(dots)
            p = p / p.sum()
            scores = []
            for t in places:
                heads = [weights[b, s, j] * (index_q[b, s, j] @ index_k[b, t]).clamp(min=0) for j in range(J)]
                scores.append(torch.stack(heads).sum())
            log = torch.stack(scores) - torch.logsumexp(torch.stack(scores), 0)
            total = total + (p * (p.log() - log)).sum()
    return total


def run(function, arguments: tuple, dtype: torch.dtype) -> list[Tensor]:
    """Loss and the gradients of index_q, index_k and weights, of three times the loss."""
    inputs = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    loss = function(*leaves, *inputs[3:])
    (3 * loss).backward()
    return [loss.detach(), *(x.grad for x in leaves)]


CASES = {
    "odd": case(2, 9, 3, 7, 2, 5),
    "one position": case(2, 1, 2, 4, 3, 4),
    "selected": case(2, 13, 3, 8, 2, 6, "selected"),
    "documents": case(2, 11, 2, 6, 1, 24, "documents"),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f64", "f32"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(CASES))
def test_equals_the_naive_loop(name: str, backend: str, dtype: torch.dtype) -> None:
    skip_unless_it_takes("indexer_kl", backend, dtype)
    want = run(naive, CASES[name], torch.float64)
    with ops.use(backend):
        got = run(ops.indexer_kl, CASES[name], dtype)
    assert got[0].dtype == dtype and got[0].shape == ()
    for which, (a, b) in enumerate(zip(got, want, strict=True)):
        worst = (a.double() - b).abs().max().item()
        assert worst <= TOLERANCE[dtype] * max(1.0, b.abs().max().item()), f"tensor {which}: {worst}"


@pytest.mark.parametrize("name", ["odd", "selected", "documents"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(name: str, backend: str) -> None:
    leaves = [a.clone().requires_grad_() for a in CASES[name][:3]]
    with ops.use(backend):
        assert torch.autograd.gradcheck(lambda *x: ops.indexer_kl(*x, *CASES[name][3:]), leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_target_gets_no_gradient_and_costs_none_without_grad(backend: str) -> None:
    index, rest = CASES["odd"][:3], CASES["odd"][3:]
    q, k = (x.float().requires_grad_() for x in rest[:2])
    with ops.use(backend):
        loss = ops.indexer_kl(*(x.float().requires_grad_() for x in index), q, k, *rest[2:])
        loss.backward()
        with torch.no_grad():
            same = ops.indexer_kl(*(x.float() for x in index), q, k, *rest[2:])
    assert q.grad is None and k.grad is None
    torch.testing.assert_close(loss.detach(), same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_indexer_that_agrees_costs_nothing(backend: str) -> None:
    """With one head, one indexer head, positive products and the same vectors, I is the attention's own score."""
    q, k = (normal(1, 6, 8, seed=s).abs().float() for s in (0, 1))
    weights = torch.full((1, 6, 1), 0.25)
    with ops.use(backend):
        loss = ops.indexer_kl(q[:, :, None], k, weights, q[:, :, None], k[:, :, None], 0.25)
        off = ops.indexer_kl(q[:, :, None], k, 3 * weights, q[:, :, None], k[:, :, None], 0.25)
    assert abs(loss.item()) < 1e-5 < 0.05 < off.item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_targets_and_indexers(backend: str) -> None:
    want = run(naive, CASES["selected"], torch.float64)
    with ops.use(backend):
        got = run(ops.indexer_kl, CASES["selected"], torch.bfloat16)
    assert got[0].dtype == torch.float32 and {g.dtype for g in got[1:]} == {torch.bfloat16}
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= 0.02 * b.norm()


def test_extreme_scores_stay_finite_and_bits_repeat() -> None:
    arguments = tuple(200 * x if i in (0, 3) else x for i, x in enumerate(CASES["selected"]))
    runs = []
    torch.use_deterministic_algorithms(True)  # buffers that nobody wrote are NaN
    try:
        runs = [run(ops.indexer_kl, arguments, torch.float32) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*runs, strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b)


def test_memory_follows_blocks_not_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """H · S · S probabilities would be 64 MiB here."""
    monkeypatch.undo()
    S = 1024
    inputs = [torch.randn(1, S, *rest) for rest in ((4, 8), (8,), (4,), (16, 8), (16, 8))]
    inputs[0].requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.indexer_kl(*inputs, 0.3)
    assert max(event.cpu_memory_usage for event in profile.events() or []) <= 8 * cpu_loss.PROBABILITIES


def call(**changed: object) -> dict:
    names = ("index_q_BSJI", "index_k_BSI", "weights_BSJ", "q_BSHQ", "k_BSHQ", "scale")
    return dict(zip(names, case(1, 3, 2, 4, 2, 4)[:6], strict=True)) | changed


WRONG = [
    (call(index_k_BSI=torch.ones(1, 3, 5)), r"index_q and index_k must be .* got \[1, 3, 2, 4\] and \[1, 3, 5\]"),
    (call(weights_BSJ=torch.ones(1, 3, 3)), r"weights must be \[B, S, J\] = \[1, 3, 2\]"),
    (call(k_BSHQ=torch.ones(1, 3, 2, 5)), "q and k must both be"),
    (call(q_BSHQ=torch.ones(1, 3, 2, 4).long()), "q must be floating point"),
    (call(selected_BSS=torch.ones(1, 3, 3)), r"selected must be boolean \[B, S, S\]"),
    (call(document_ids_BS=torch.ones(3)), "document ids must be"),
    (call(selected_BSS=torch.ones(1, 3, 3) > 0, document_ids_BS=torch.ones(1, 3)), "exclude each other"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.indexer_kl(**arguments)
