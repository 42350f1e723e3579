"""Triton's causal and selected attention at the borders of its tiles, against the reference."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ops_cases import normal

from nautile import ops
from nautile.ops.numerics import MLA_PREFILL_OUT, within
from nautile.ops.triton import flash
from nautile.ops.triton.flash import Launch, Masks, Widths


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 × 16 and the other way round, so that 41 positions take several of each."""
    monkeypatch.setattr(flash, "forward_launch", lambda *_: Launch(32, 16, 4, 1))
    monkeypatch.setattr(flash, "keys_launch", lambda *_: Launch(16, 32, 4, 1))
    monkeypatch.setattr(flash, "queries_launch", lambda *_: Launch(16, 32, 4, 1))


def tensors(S: int, H: int, G: int, Q: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    sizes = ((H, Q), (G, Q), (G, V))
    return tuple(normal(g, 2, S, heads, width).to(dtype) for heads, width in sizes)


def run(backend: str, op, inputs: tuple[Tensor, ...], *rest) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with ops.use(backend):
        o = op(*leaves, *rest)
    upstream = normal(torch.Generator().manual_seed(1), *o.shape)
    return [o.detach(), *torch.autograd.grad(o, leaves, upstream.to(o.dtype))]


def assert_equal(got: list[Tensor], want: list[Tensor], tolerance: float = 2e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("S", "H", "G", "Q", "V"),
    [(41, 2, 1, 24, 16), (32, 1, 1, 16, 33), (33, 4, 2, 65, 8), (1, 3, 3, 5, 2)],
)
def test_head_widths_with_a_rest_and_shared_keys(S: int, H: int, G: int, Q: int, V: int) -> None:
    inputs = tensors(S, H, G, Q, V)
    got, want = (run(b, ops.causal_attention, inputs, 0.3) for b in ("triton", "reference"))
    assert_equal(got, want)


def documents(kind: str) -> Tensor:
    if kind == "interleaved":
        return torch.arange(41).remainder(3).expand(2, 41)
    if kind == "negative ids, one long":
        return torch.cat([torch.full((2, 5), -7), torch.full((2, 34), 3), torch.full((2, 2), -9)], 1)
    return torch.bucketize(torch.arange(82), torch.tensor([0, 1, 17, 33, 41, 60]), right=True).view(2, 41)


@pytest.mark.parametrize("kind", ["interleaved", "negative ids, one long", "packed"])
def test_documents(kind: str) -> None:
    inputs, ids = tensors(41, 2, 1, 8, 8), documents(kind)
    got, want = (run(b, ops.causal_attention, inputs, 0.3, ids) for b in ("triton", "reference"))
    assert_equal(got, want)


@pytest.mark.parametrize("kind", ["interleaved", "negative ids, one long", "packed"])
def test_bounds_of_documents(kind: str) -> None:
    ids = documents(kind)
    masks = Masks.of_documents(ids)
    for b in range(2):
        for i in range(41):
            same = [j for j in range(41) if ids[b, j] == ids[b, i]]
            assert (masks.first_BS[b, i], masks.last_BS[b, i]) == (same[0], same[-1])


def test_selected_positions_and_a_query_without_any() -> None:
    inputs = tensors(41, 2, 2, 8, 5)
    selected = torch.rand(2, 41, 41, generator=torch.Generator().manual_seed(3)) < 0.1
    selected |= torch.eye(41, dtype=torch.bool)
    selected[1, :20, :16] = False  # whole tiles without a selected key
    selected[:, torch.arange(41), torch.arange(41)] = True
    got, want = (run(b, ops.selected_attention, inputs, selected, 0.3) for b in ("triton", "reference"))
    assert_equal(got, want)
    selected[0, 7] = False
    got = run("triton", ops.selected_attention, inputs, selected, 0.3)
    assert all(x.isfinite().all() for x in got)
    assert (got[0][0, 7] == 0).all() and (got[1][0, 7] == 0).all()


@pytest.mark.parametrize("documented", [False, True])
def test_bfloat16_is_within_the_official_bar_and_bits_repeat(documented: bool) -> None:
    inputs = tuple(x / 3 for x in tensors(41, 4, 2, 24, 16, torch.bfloat16))
    ids = documents("packed") if documented else None
    want = run("reference", ops.causal_attention, tuple(x.float() for x in inputs), 24**-0.5, ids)
    got, again = (run("triton", ops.causal_attention, inputs, 24**-0.5, ids) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert within(got[0], want[0], MLA_PREFILL_OUT) is None
    for a, b in zip(got[1:], want[1:], strict=True):
        assert (a.float() - b).norm() <= 0.01 * b.norm()


def test_an_offset_far_from_zero_does_not_overflow() -> None:
    q, k, v = tensors(19, 1, 1, 8, 8)
    inputs = (q * 100, k * 100 + 50, v)
    got, want = (run(b, ops.causal_attention, inputs, 1.0) for b in ("triton", "reference"))
    assert_equal(got[:1], want[:1], 1e-3)
    assert all(x.isfinite().all() for x in got)


def test_no_positions_and_no_sequences() -> None:
    for B, S in ((0, 3), (2, 0)):
        inputs = (torch.ones(B, S, 4, 8), torch.ones(B, S, 2, 8), torch.ones(B, S, 2, 5))
        o, *grads = run("triton", ops.causal_attention, inputs, 1.0)
        assert o.shape == (B, S, 4, 5) and [g.shape for g in grads] == [x.shape for x in inputs]


def test_more_heads_than_the_second_axis_of_a_grid_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA takes 65535 blocks along the second and third axis, and 2³¹ − 1 along the first."""
    grids = []

    class Launched:
        def __getitem__(self, grid: tuple[int, ...]):
            grids.append(grid)
            return lambda *_, **__: None

    for kernel in ("attend_forward", "gradients_of_keys", "gradients_of_queries"):
        monkeypatch.setattr(flash, kernel, Launched())
    run("triton", ops.causal_attention, (torch.ones(2, 33, 40_000, 2),) * 3, 1.0)
    assert grids == [(2 * 80_000,), (2 * 80_000,), (3 * 80_000,)]


def test_widths_waste_little() -> None:
    assert Widths.of(192, 128) == (128, 64, 128)
    assert Widths.of(576, 512) == (512, 64, 512)
    assert Widths.of(64, 64) == (64, 0, 64)
    assert Widths.of(5, 3) == (16, 0, 16)
    assert Widths.of(40, 40) == (32, 16, 64)
