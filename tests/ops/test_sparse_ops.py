"""Index scores, selection and both forms of sparse attention against naive float64 loops, forward and backward."""

import pytest
import torch
from ops_cases import skip_unless_it_takes
from torch import Tensor

from nautile import ops
from nautile.ops.cpu import indexer as cpu_indexer
from nautile.ops.cpu import rows as cpu_rows
from nautile.ops.cpu import sparse_attention as cpu_sparse
from nautile.ops.dispatch import TABLE

OPS = ("index_scores", "gathered_attention", "selected_attention")
BACKENDS = TABLE["index_scores"][1]
OPS_BACKENDS = [(op, backend) for op in OPS for backend in TABLE[op][1]]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def naive_index_scores(q, k, weights) -> Tensor:
    B, S, J, _ = q.shape
    rows = []
    for b in range(B):
        for s in range(S):
            for t in range(k.shape[1]):
                products = [weights[b, s, j] * torch.clamp(torch.dot(q[b, s, j], k[b, t]), min=0) for j in range(J)]
                rows.append(torch.stack(products).sum())
    return torch.stack(rows).view(B, S, k.shape[1])


def naive_gathered_attention(q, q_rope, c, k_rope, rows, scale) -> Tensor:
    B, S, H, C = q.shape
    out = []
    for b in range(B):
        for s in range(S):
            chosen = [int(r) for r in rows[b, s] if r >= 0]
            for h in range(H):
                if not chosen:
                    out.append(torch.zeros(C, dtype=q.dtype))
                    continue
                dots = [torch.dot(q[b, s, h], c[b, r]) + torch.dot(q_rope[b, s, h], k_rope[b, r]) for r in chosen]
                weights = torch.exp(scale * (torch.stack(dots) - torch.stack(dots).max()))
                out.append((weights / weights.sum()) @ c[b, chosen])
    return torch.stack(out).view(B, S, H, C)


def naive_selected_attention(q, k, v, selected, scale) -> Tensor:
    B, S, H, _ = q.shape
    out = []
    for b in range(B):
        for s in range(S):
            chosen = [t for t in range(s + 1) if selected[b, s, t]]
            for h in range(H):
                scores = torch.stack([scale * torch.dot(q[b, s, h], k[b, t, h]) for t in chosen])
                weights = torch.exp(scores - scores.max())
                out.append((weights / weights.sum()) @ v[b, chosen, h])
    return torch.stack(out).view(B, S, H, -1)


NAIVE = {
    "index_scores": naive_index_scores,
    "gathered_attention": naive_gathered_attention,
    "selected_attention": naive_selected_attention,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores_case(B: int, S: int, J: int, width: int, T: int) -> tuple:
    return normal(B, S, J, width), normal(B, T, width, seed=1), normal(B, S, J, seed=2)


def some_rows(B: int, S: int, T: int, K: int, unused: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    rows = torch.stack([torch.randperm(T, generator=generator)[:K] for _ in range(B * S)]).view(B, S, K)
    for s in range(S):
        rows[:, s, : min(K, s * unused)] = -1
    return rows


def sparse_case(B: int, S: int, H: int, C: int, R: int, T: int, K: int, unused: int = 0) -> tuple:
    rows = some_rows(B, S, T, K, unused)
    return normal(B, S, H, C), normal(B, S, H, R, seed=1), normal(B, T, C, seed=2), normal(B, T, R, seed=3), rows, 0.3


def selected_case(B: int, S: int, H: int, Q: int, V: int) -> tuple:
    selected = torch.rand(B, S, S, generator=torch.Generator().manual_seed(4)) < 0.4
    selected |= torch.eye(S, dtype=torch.bool)
    return normal(B, S, H, Q), normal(B, S, H, Q, seed=1), normal(B, S, H, V, seed=2), selected, 0.4


CASES = {
    "index_scores odd": ("index_scores", scores_case(2, 5, 3, 7, 11)),
    "index_scores one query": ("index_scores", scores_case(1, 1, 4, 6, 9)),
    "index_scores one head": ("index_scores", scores_case(1, 3, 1, 2, 5)),
    "gathered_attention odd": ("gathered_attention", sparse_case(2, 5, 3, 7, 4, 13, 6)),
    "gathered_attention unused": ("gathered_attention", sparse_case(2, 5, 3, 7, 4, 13, 6, unused=1)),
    "gathered_attention without any row": ("gathered_attention", sparse_case(1, 5, 2, 3, 2, 9, 4, unused=2)),
    "gathered_attention one query": ("gathered_attention", sparse_case(3, 1, 2, 5, 2, 9, 9)),
    "selected_attention odd": ("selected_attention", selected_case(2, 9, 3, 6, 5)),
    "selected_attention one token": ("selected_attention", selected_case(1, 1, 2, 4, 3)),
    "selected_attention blocks": ("selected_attention", selected_case(1, 21, 1, 4, 6)),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that small inputs take several, the last one partial."""
    monkeypatch.setattr(cpu_indexer, "BLOCK_ROWS", 4)
    monkeypatch.setattr(cpu_indexer, "BLOCK_PRODUCTS", 30)
    monkeypatch.setattr(cpu_rows, "GATHERED_NUMBERS", 130)
    monkeypatch.setattr(cpu_sparse, "BLOCK", 8)
    monkeypatch.setattr(cpu_sparse, "SCORES", 140)


def run(function, arguments: tuple, dtype: torch.dtype) -> list[Tensor]:
    """Output, then the gradient of each floating argument, for a fixed upstream gradient."""
    leaves = [
        a.detach().to(dtype).requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    y = function(*leaves)
    y.backward(normal(*y.shape, seed=5).to(y.dtype))
    return [y.detach(), *(a.grad for a in leaves if isinstance(a, Tensor) and a.requires_grad)]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f64", "f32"])
@pytest.mark.parametrize(("name", "backend"), [(n, b) for n in CASES for b in TABLE[CASES[n][0]][1]])
def test_equals_the_naive_loop(name: str, backend: str, dtype: torch.dtype, small_blocks: None) -> None:
    op, arguments = CASES[name]
    skip_unless_it_takes(op, backend, dtype)
    want = run(NAIVE[op], arguments, torch.float64)
    with ops.use(backend):
        got = run(getattr(ops, op), arguments, dtype)
    assert got[0].dtype == dtype
    for which, (a, b) in enumerate(zip(got, want, strict=True)):
        worst = (a.double() - b).abs().max().item()
        assert worst <= TOLERANCE[dtype] * max(1.0, b.abs().max().item()), f"tensor {which}: {worst}"


@pytest.mark.parametrize(("op", "backend"), OPS_BACKENDS)
def test_autocast_lowers_attention_but_not_the_scores_that_choose(op: str, backend: str) -> None:
    _, arguments = CASES[f"{op} odd"]
    want = run(NAIVE[op], arguments, torch.float64)
    with ops.use(backend), torch.autocast("cpu", torch.bfloat16):
        got = run(getattr(ops, op), arguments, torch.float32)
    assert got[0].dtype == (torch.float32 if op == "index_scores" else torch.bfloat16)
    for which, (a, b) in enumerate(zip(got, want, strict=True)):
        tolerance = 1e-5 if op == "index_scores" and which == 0 else 0.02
        assert a.dtype == torch.float32 or which == 0
        assert (a.double() - b).norm() <= tolerance * b.norm(), f"tensor {which}"


def test_scores_of_bfloat16_keys_are_summed_in_float32() -> None:
    q, k, weights = (x.to(torch.bfloat16) for x in scores_case(2, 5, 16, 32, 11))
    scores = ops.index_scores(q, k, weights)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, naive_index_scores(*(x.double() for x in (q, k, weights))).float())


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str, small_blocks: None) -> None:
    _, arguments = CASES[f"{op} odd"]
    leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    with ops.use("cpu"):
        assert torch.autograd.gradcheck(getattr(ops, op), leaves, fast_mode=True)


@pytest.mark.parametrize("name", list(CASES))
def test_memory_that_nobody_wrote_is_not_read_and_bits_repeat(name: str, small_blocks: None) -> None:
    """torch.empty returns NaN here: a buffer used before it is written would show."""
    op, arguments = CASES[name]
    torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory, the default
    try:
        first, second = (run(getattr(ops, op), arguments, torch.float32) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b)


@pytest.mark.parametrize("backend", TABLE["gathered_attention"][1])
def test_rows_that_nobody_names_may_hold_anything(backend: str) -> None:
    *tensors, _, scale = sparse_case(2, 3, 2, 5, 4, 12, 4)
    q, q_rope, c, k_rope = (x.float() for x in tensors)
    rows = some_rows(2, 3, 7, 4, unused=1) + 1  # rows 1..7 are named; an unused place is 0 after the shift
    rows[rows == 0] = -1
    clean = naive_gathered_attention(q, q_rope, c, k_rope, rows, scale)
    c[:, 0], c[:, 8:], k_rope[:, 0], k_rope[:, 8:] = (float("nan"),) * 4
    with ops.use(backend):
        torch.testing.assert_close(ops.gathered_attention(q, q_rope, c, k_rope, rows, scale), clean)


@pytest.mark.parametrize("backend", TABLE["gathered_attention"][1])
def test_of_no_rows_comes_zero(backend: str) -> None:
    q, q_rope, c, k_rope = (x.float() for x in sparse_case(2, 3, 2, 5, 4, 0, 0)[:4])
    arguments = (q, q_rope, c, k_rope, torch.full((2, 3, 4), -1), 0.3)
    with ops.use(backend):
        out, *grads = run(ops.gathered_attention, arguments, torch.float32)
    for got, like in zip((out, *grads), (q, *arguments[:4]), strict=True):
        assert torch.equal(got, torch.zeros_like(like))


def naive_top(scores: Tensor, seen: Tensor, k: int) -> list[list[set[int]]]:
    def best(row: Tensor, visible: Tensor) -> set[int]:
        order = sorted((t for t in range(len(row)) if visible[t]), key=lambda t: (-row[t].item(), t))
        return set(order[:k])

    return [[best(r, v) for r, v in zip(a, b, strict=True)] for a, b in zip(scores, seen, strict=True)]


def as_sets(rows: Tensor) -> list[list[set[int]]]:
    for row in rows.flatten(0, 1).tolist():
        named = [r for r in row if r >= 0]
        assert len(set(named)) == len(named)
    return [[{int(r) for r in row if r >= 0} for row in sequence] for sequence in rows]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 3, 7, 12, 40])
@pytest.mark.parametrize("levels", [0, 1, 3], ids=["distinct", "all-equal", "many-ties"])
def test_top_rows(backend: str, k: int, levels: int) -> None:
    scores = normal(3, 12, 12)
    if levels:
        scores = (scores * 2).round().clamp(0, levels - 1)
    seen = torch.ones(3, 12, 12, dtype=torch.bool).tril()
    seen[1, :, :5] = False
    want = naive_top(scores, seen, k)
    scores[~seen] = float("nan")
    with ops.use(backend):
        rows = ops.top_rows(scores.float().requires_grad_(), seen, k)
    assert rows.dtype == torch.int64 and rows.shape == (3, 12, min(k, 12)) and not rows.requires_grad
    assert as_sets(rows) == want


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tie_is_broken_the_same_way_however_many_rows_follow(backend: str) -> None:
    scores = normal(1, 1, 40).round().float()
    with ops.use(backend):
        short = ops.top_rows(scores[..., :23], torch.ones(1, 1, 23, dtype=torch.bool), 9)
        long = ops.top_rows(scores, torch.arange(40)[None, None] < 23, 9)
    assert as_sets(short) == as_sets(long)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_no_rows_none_is_chosen(backend: str) -> None:
    with ops.use(backend):
        assert ops.top_rows(torch.ones(2, 3, 0), torch.ones(2, 3, 0, dtype=torch.bool), 4).shape == (2, 3, 0)


def test_scores_never_exist_for_all_heads_at_once() -> None:
    """S·J·T products would be 128 MiB here; what is allocated beside inputs and outputs stays at one block."""
    q, k, weights = torch.randn(1, 64, 16, 8), torch.randn(1, 32768, 8), torch.randn(1, 64, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.index_scores(q, k, weights)
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert largest <= 64 * 32768 * 4 + 8 * cpu_indexer.BLOCK_PRODUCTS


WRONG = [
    (lambda: ops.index_scores(torch.ones(1, 2, 3, 4), torch.ones(1, 5, 3), torch.ones(1, 2, 3)), "q and k"),
    (lambda: ops.index_scores(torch.ones(1, 2, 3, 4), torch.ones(1, 5, 4), torch.ones(1, 2, 4)), "weights"),
    (lambda: ops.index_scores(*(x.long() for x in scores_case(1, 2, 3, 4, 5))), "floating"),
    (lambda: ops.top_rows(torch.ones(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool), 0), "k must"),
    (lambda: ops.top_rows(torch.ones(1, 2, 3), torch.ones(1, 2, 3), 1), "boolean"),
    (lambda: ops.top_rows(torch.ones(1, 2, 3), torch.ones(1, 2, 4, dtype=torch.bool), 1), "fit scores"),
    (lambda: ops.top_rows(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), 1), "scores"),
    (lambda: sparse(c=torch.ones(1, 5, 3)), "q and c"),
    (lambda: sparse(k_rope=torch.ones(1, 5, 3)), "q_rope and k_rope"),
    (lambda: sparse(rows=torch.zeros(1, 2, 3)), "int64"),
    (lambda: selected(selected=torch.ones(1, 2, 2)), "boolean"),
    (lambda: selected(k=torch.ones(1, 3, 1, 4)), "q and k"),
    (lambda: selected(v=torch.ones(1, 2, 3, 4)), "v must"),
]


def sparse(c=None, k_rope=None, rows=None) -> Tensor:
    """A gathered_attention of C = 4, R = 2, T = 5, with one argument replaced."""
    return ops.gathered_attention(
        torch.ones(1, 2, 3, 4),
        torch.ones(1, 2, 3, 2),
        torch.ones(1, 5, 4) if c is None else c,
        torch.ones(1, 5, 2) if k_rope is None else k_rope,
        torch.zeros(1, 2, 3, dtype=torch.int64) if rows is None else rows,
        1.0,
    )


def selected(k=None, v=None, selected=None) -> Tensor:
    """A selected_attention of S = 2, H = 1, Q = V = 4, with one argument replaced."""
    return ops.selected_attention(
        torch.ones(1, 2, 1, 4),
        torch.ones(1, 2, 1, 4) if k is None else k,
        torch.ones(1, 2, 1, 4) if v is None else v,
        torch.ones(1, 2, 2, dtype=torch.bool) if selected is None else selected,
        1.0,
    )


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
