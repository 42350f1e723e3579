"""The Triton twins of index_scores and top_rows: tiles that do not divide, strides, dtypes, odd numbers."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from nautile import ops
from nautile.ops.triton import indexer as kernels


@pytest.fixture(autouse=True)
def several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "CHUNK", 128)
    monkeypatch.setattr(kernels, "ROWS_AT_ONCE", 16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(q: Tensor, k: Tensor, weights: Tensor, upstream: Tensor) -> list[list[Tensor]]:
    """Scores and gradients by Triton, and by the reference in float64."""
    results = []
    for backend, dtype in (("triton", None), ("reference", torch.float64)):
        leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in (q, k, weights)]
        with ops.use(backend):
            scores = ops.index_scores(*leaves)
        scores.backward(upstream.to(scores.dtype))
        results.append([scores.detach(), *(x.grad for x in leaves)])
    return results


@pytest.mark.parametrize(("B", "S", "J", "I", "T"), [(2, 5, 64, 128, 70), (1, 9, 3, 20, 150), (1, 1, 16, 32, 1)])
def test_tiles_that_do_not_divide(B: int, S: int, J: int, I: int, T: int) -> None:  # noqa: E741
    got, want = both(normal(B, S, J, I), normal(B, T, I, seed=1), normal(B, S, J, seed=2), normal(B, S, T, seed=3))
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= 1e-6 * b.norm()


def test_bfloat16_inputs_give_exact_products_and_rounded_gradients() -> None:
    q, k, weights = normal(1, 4, 16, 32).bfloat16(), normal(1, 40, 32, seed=1).bfloat16(), normal(1, 4, 16, seed=2)
    got, want = both(q, k, weights, normal(1, 4, 40, seed=3))
    assert got[0].dtype == torch.float32 and got[1].dtype == torch.bfloat16 and got[3].dtype == torch.float32
    for a, b, tolerance in zip(got, want, (1e-6, 0.006, 0.006, 1e-6), strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_non_contiguous_inputs_of_two_dtypes() -> None:
    q, k = normal(1, 16, 4, 32).transpose(1, 2).bfloat16(), normal(32, 40, 1, seed=1).permute(2, 1, 0)
    got, want = both(q, k, normal(1, 16, 4, seed=2).transpose(1, 2), normal(1, 4, 40, seed=3))
    for a, b, tolerance in zip(got, want, (1e-6, 0.006, 1e-6, 1e-6), strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_nothing_to_score() -> None:
    with ops.use("triton"):
        assert ops.index_scores(normal(2, 0, 3, 8), normal(2, 5, 8), normal(2, 0, 3)).shape == (2, 0, 5)
        q = normal(2, 3, 3, 8).requires_grad_()
        ops.index_scores(q, normal(2, 0, 8), normal(2, 3, 3)).sum().backward()
        assert q.grad is not None and not q.grad.any()
        assert ops.top_rows(normal(2, 3, 0), torch.ones(2, 3, 0, dtype=torch.bool), 4).shape == (2, 3, 0)


HARD = [-0.0, 0.0, 1e-45, -1e-45, float("inf"), float("-inf"), 3.0, -3.0, float("nan"), 3.0, 3.0000002, -1e30, 1e-40]


@pytest.mark.parametrize("k", [1, 4, 9, 13, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_selection_equals_a_stable_sort_for_all_kinds_of_numbers(k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(k)
    numbers = torch.tensor(HARD)
    scores = numbers[torch.randint(len(HARD), (1, 3, 41), generator=generator)].to(dtype)
    seen = torch.rand(1, 3, 41, generator=generator) < 0.8
    seen[0, 2] = False
    picked = []
    for backend in ("triton", "reference"):
        with ops.use(backend):
            picked.append(ops.top_rows(scores, seen, k))
    assert torch.equal(picked[0].sort(-1).values, picked[1].sort(-1).values)
    inside = picked[0].masked_fill(picked[0] < 0, 99)
    assert torch.equal(inside, inside.sort(-1).values), "ascending, unused places last"


def test_selection_reads_strided_scores_and_broadcast_masks() -> None:
    scores = normal(3, 60, 2).permute(2, 0, 1)[..., ::2]
    seen = torch.arange(30) < 25
    with ops.use("triton"):
        got = ops.top_rows(scores, seen[None, None], 7)
    want = scores.masked_fill(~seen, float("-inf")).topk(7).indices
    assert torch.equal(got, want.sort(-1).values)
