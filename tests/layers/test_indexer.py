"""The lightning indexer against a naive loop, and what its FP8 simulation does to numbers."""

import math

import pytest
import torch
from torch import Tensor

from nautile.checkpoint.allocate import float32_names
from nautile.layers.attention import index_fp8
from nautile.layers.attention import indexer as indexer_module
from nautile.layers.attention.index_fp8 import as_stored_in_fp8, fp8_rounded, hadamard
from nautile.layers.attention.indexer import Indexer
from nautile.layers.rope import Rope

DIM, LATENT, HEADS, WIDTH, ROTATED = 13, 9, 17, 8, 6
ROPE = Rope(ROTATED, 100.0)


def make(topk: int = 5, fp8: bool = False, seed: int = 0) -> Indexer:
    indexer = Indexer(DIM, LATENT, HEADS, WIDTH, rope_dim=ROTATED, topk=topk, fp8=fp8).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in indexer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return indexer


def inputs(B: int = 2, S: int = 11) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, c_q = (torch.randn(B, S, width, generator=generator, dtype=torch.float64) for width in (DIM, LATENT))
    return x, c_q, ROPE.cos_sin(torch.arange(S).expand(B, S))


def causal(B: int, S: int) -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril().expand(B, S, S)


def naive_scores(indexer: Indexer, x: Tensor, c_q: Tensor) -> Tensor:
    """The formulas of the docstring, one number at a time."""

    def rotated(v: Tensor, position: int) -> Tensor:
        v, half = v.clone(), ROTATED // 2
        for i in range(half):
            angle = position * 100.0 ** (-2 * i / ROTATED)
            a, b = v[i].item(), v[half + i].item()
            v[i], v[half + i] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
        return v

    out = torch.zeros(x.shape[0], x.shape[1], x.shape[1], dtype=torch.float64)
    for b in range(x.shape[0]):
        keys = []
        for t, row in enumerate(x[b]):
            k = indexer.wk.weight @ row
            k = (k - k.mean()) / (k.var(unbiased=False) + 1e-6).sqrt() * indexer.k_norm.weight + indexer.k_norm.bias
            keys.append(rotated(k, t))
        for s, row in enumerate(x[b]):
            heads = (indexer.wq_b.weight @ c_q[b, s]).view(HEADS, WIDTH)
            weights = indexer.weights_proj.weight @ row * HEADS**-0.5 * WIDTH**-0.5
            for t, k in enumerate(keys):
                for j in range(HEADS):
                    out[b, s, t] += weights[j] * max(0.0, (rotated(heads[j], s) @ k).item())
    return out


def test_scores_are_the_published_formula() -> None:
    indexer, (x, c_q, angles) = make(), inputs()
    with torch.no_grad():
        got, want = indexer.scores(x, c_q, indexer.keys(x, angles), angles), naive_scores(indexer, x, c_q)
    assert want.min() < 0 < want.max(), "weights of both signs"
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # angles are float32


@pytest.mark.parametrize("at_once", [1 << 22, 40], ids=["one-block", "blocks-of-one-query"])
def test_rows_and_mask_are_the_best_visible_tokens(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer_module, "SCORES_AT_ONCE", at_once)
    indexer, (x, c_q, angles) = make(topk=4), inputs()
    keys, seen = indexer.keys(x, angles), causal(2, 11).clone()
    seen[1, 6:, :3] = False
    rows, mask = indexer.rows(x, c_q, keys, angles, seen), indexer.mask(x, c_q, keys, angles, seen)
    scores = indexer.scores(x, c_q, keys, angles)
    assert rows.shape == (2, 11, 4) and mask.shape == (2, 11, 11)
    for b in range(2):
        for s in range(11):
            visible = [t for t in range(11) if seen[b, s, t]]
            best = set(sorted(visible, key=lambda t: -scores[b, s, t].item())[:4])
            assert {int(r) for r in rows[b, s] if r >= 0} == best == {t for t in range(11) if mask[b, s, t]}


def test_only_its_own_loss_reaches_it_and_reaches_nothing_else() -> None:
    indexer, (x, c_q, angles) = make(), inputs()
    x.requires_grad_(), c_q.requires_grad_()
    keys = indexer.keys(x, angles)
    assert not indexer.rows(x, c_q, keys, angles, causal(2, 11)).requires_grad
    indexer.scores(x, c_q, keys, angles).sin().sum().backward()
    assert x.grad is None and c_q.grad is None
    assert all(p.grad is not None and p.grad.norm() > 0 for p in indexer.parameters())


def test_what_scores_hang_on_stays_float32_in_a_bfloat16_model() -> None:
    indexer, (x, c_q, angles) = make().to(torch.bfloat16), inputs()
    kept = sorted(float32_names(indexer))
    assert kept == ["k_norm.bias", "k_norm.weight", "weights_proj.weight"]
    x, c_q = x.bfloat16(), c_q.bfloat16()
    keys = indexer.keys(x, angles)
    assert keys.dtype == torch.bfloat16
    assert indexer.weights(x).dtype == indexer.scores(x, c_q, keys, angles).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert make().float().weights(x.float()).dtype == torch.float32


def sylvester(width: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.float64)
    while H.shape[0] < width:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), H)
    return H


@pytest.mark.parametrize("width", [1, 2, 8, 128])
def test_hadamard_is_sylvesters_matrix(width: int) -> None:
    x = torch.randn(3, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = x @ sylvester(width) * width**-0.5
    torch.testing.assert_close(hadamard(x), expected, atol=1e-12, rtol=1e-12)
    rounded_once = (x.bfloat16().double() @ sylvester(width) * width**-0.5).bfloat16()
    torch.testing.assert_close(hadamard(x.bfloat16()), rounded_once, atol=1e-6, rtol=0.008)


def test_hadamard_without_rounding_changes_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    x, c_q, angles = inputs()
    monkeypatch.setattr(index_fp8, "fp8_rounded", lambda x: x)
    plain, turned = make(), make(fp8=True)
    with torch.no_grad():
        keys, turned_keys = plain.keys(x, angles), turned.keys(x, angles)
        assert (keys - turned_keys).abs().max() > 0.1
        expected = plain.scores(x, c_q, keys, angles)
        torch.testing.assert_close(turned.scores(x, c_q, turned_keys, angles), expected, atol=1e-12, rtol=1e-12)


def naive_e4m3(value: float) -> float:
    """Nearest number of four exponent and three mantissa bits, ties to even."""
    if value == 0.0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))), -6)
    step = 2.0 ** (exponent - 3)
    return max(-448.0, min(448.0, round(value / step) * step))


@pytest.mark.parametrize("size", [1.0, 1e3, 1e-3, 1e-7])
def test_fp8_rounding_is_one_power_of_two_per_vector(size: float) -> None:
    x = size * torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    x[0] = 0.0
    x[1, 0] = 448.0 * 4  # amax / 448 is a power of two itself
    x[1, 1:] = 0.025  # under twice the scale it would be rounded otherwise
    got = fp8_rounded(x)
    for row, rounded in zip(x.tolist(), got.tolist(), strict=True):
        amax = max(max(map(abs, row)), 1e-4)
        scale = 2.0 ** math.ceil(math.log2(amax / 448))
        assert rounded == [naive_e4m3(value / scale) * scale for value in row]
    assert torch.equal(fp8_rounded(got), got)
    assert torch.equal(got.bfloat16().float(), got)


def test_fp8_keeps_most_of_the_selection() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, w = (torch.randn(shape, generator=generator) for shape in ((1, 64, 64, 128), (1, 512, 128), (1, 64, 64)))
    seen = torch.ones(1, 64, 512, dtype=torch.bool)
    exact = indexer_module.ops.top_rows(indexer_module.ops.index_scores(q, k, w), seen, 64)
    rounded = indexer_module.ops.index_scores(as_stored_in_fp8(q), as_stored_in_fp8(k), w)
    rounded = indexer_module.ops.top_rows(rounded, seen, 64)
    kept = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(exact[0], rounded[0], strict=True)]
    assert 0.9 < sum(kept) / (64 * 64) < 1.0
