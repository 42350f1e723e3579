"""Decoding over paged latents, dense and sparse: naive loops over tokens in float64, and FlashMLA's bars.

Whatever is not to be read is NaN, and what is not to be followed points far away.
"""

import math

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops.dispatch import TABLE
from nautile.ops.latent_layout import PLANES, ROWS, LatentLayout
from nautile.ops.numerics import MLA_DENSE_OUT, MLA_LSE, MLA_SPARSE_DECODE_OUT, within
from nautile.ops.reference.latent_bytes import dequantize_rows

NAN, INF = float("nan"), float("inf")
WILD = (-1, -2147483648, 2147483647)
DENSE = [backend for backend in TABLE["paged_mla_decode"][1] if backend != "hopper"]
SPARSE = TABLE["paged_sparse_mla_decode"][1]
B16 = torch.bfloat16


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(q_X: Tensor, keys: list[Tensor], scale: float, v_dim: int, sink: float | None) -> tuple[Tensor, float]:
    """One head of one query, key by key."""
    if not keys:
        return torch.zeros(v_dim, dtype=torch.float64), INF
    scores = [scale * float(q_X.double() @ key) for key in keys]
    lse = max(scores) + math.log(sum(math.exp(score - max(scores)) for score in scores))
    o_V = sum((math.exp(score - lse) * key[:v_dim] for score, key in zip(scores, keys, strict=True)), torch.zeros(()))
    return o_V if sink is None else o_V / (1 + math.exp(min(sink - lse, 700.0))), lse


# Dense: B is the number of lengths. S, H, G, X, V, P as in the op; latents and the table have gaps between them.
DENSE_CASES = {
    "one-token": ((1, 1, 1, 24, 16, 8), [1], False),
    "short-of-queries": ((4, 3, 1, 48, 32, 16), [2, 0, 4, 70], True),
    "latent-heads": ((2, 6, 3, 40, 24, 5), [33, 7], True),
    "several-tiles-of-rows": ((3, 50, 2, 20, 20, 64), [64, 65], True),
    "not-causal": ((2, 3, 1, 33, 17, 7), [140, 0, 1], False),
    "cut-in-splits": ((2, 5, 1, 40, 32, 64), [900, 30, 0, 64], True),
    "of-deepseek": ((1, 16, 1, 576, 512, 64), [100, 20], True),
}


def dense_case(shape: tuple, lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S, H, G, X, _, P = shape
    B, W = len(lengths), -(-max(lengths) // P) + 1
    pages = torch.randperm(B * W, generator=torch.Generator().manual_seed(3)).int().view(B, W)
    cache = (normal(B * W, 2 * P, G + 1, X, seed=1) / 3).clamp(-1, 1).to(dtype)[:, ::2, :G]
    for b, length in enumerate(lengths):
        for t in range(length, W * P):
            cache[pages[b, t // P], t % P] = NAN
        pages[b, -(-length // P) :] = WILD[b % 3]
    table = torch.full((B, 2 * W), 7, dtype=torch.int32)[:, ::2]
    table.copy_(pages)
    q = (normal(B, H, S, X, seed=2) / 3).to(dtype).transpose(1, 2)
    return q, cache, table, torch.tensor(lengths, dtype=torch.int32)


def dense_loops(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, v_dim: int, causal: bool
) -> tuple[Tensor, Tensor]:
    B, S, H, X = q.shape
    P, G = cache.shape[1:3]
    o, lse = torch.zeros(B, S, H, v_dim, dtype=torch.float64), torch.zeros(B, H, S, dtype=torch.float64)
    for b in range(B):
        for s in range(S):
            seen = int(lengths[b]) - (S - 1 - s if causal else 0)
            for h in range(H):
                keys = [cache[table[b, t // P], t % P, h // (H // G)].double() for t in range(max(0, seen))]
                o[b, s, h], lse[b, h, s] = attention(q[b, s, h], keys, X**-0.5, v_dim, None)
    return o, lse


@pytest.mark.parametrize("name", list(DENSE_CASES))
def test_dense_reference(name: str) -> None:
    shape, lengths, causal = DENSE_CASES[name]
    case = dense_case(shape, lengths, torch.float64)
    with ops.use("reference"):
        got = ops.paged_mla_decode(*case, shape[4], causal=causal)
    want = dense_loops(*case, shape[4], causal)
    assert got[0].dtype == got[1].dtype == torch.float64
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [B16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("backend", [backend for backend in DENSE if backend != "reference"])
@pytest.mark.parametrize("name", list(DENSE_CASES))
def test_dense(name: str, backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the cpu backend has no float16")
    shape, lengths, causal = DENSE_CASES[name]
    case = dense_case(shape, lengths, dtype)
    with ops.use("reference"):
        want = ops.paged_mla_decode(*case, shape[4], causal=causal)
    with ops.use(backend):
        got = ops.paged_mla_decode(*case, shape[4], causal=causal)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert within(got[0], want[0], MLA_DENSE_OUT) is None
    assert within(got[1], want[1], MLA_LSE) is None


@pytest.mark.parametrize("parts", [1, 2, 9])
def test_dense_splits_that_were_planned_before(parts: int) -> None:
    shape, lengths, causal = DENSE_CASES["cut-in-splits"]
    case = dense_case(shape, lengths, B16)
    plan = ops.plan_splits(case[3], parts)
    with ops.use("reference"):
        want = ops.paged_mla_decode(*case, shape[4], causal=causal, splits=plan)
    with ops.use("triton"):
        got = ops.paged_mla_decode(*case, shape[4], causal=causal, splits=plan)
    assert within(got[0], want[0], MLA_DENSE_OUT) is None and within(got[1], want[1], MLA_LSE) is None


def test_dense_cache_without_a_dimension_of_latent_heads() -> None:
    q, cache, table, lengths = dense_case((2, 3, 1, 12, 8, 4), [9, 3], torch.float32)
    with_heads = ops.paged_mla_decode(q, cache, table, lengths, 8, scale=0.3)
    without = ops.paged_mla_decode(q, cache[:, :, 0], table, lengths, 8, scale=0.3)
    assert all(torch.equal(a, b) for a, b in zip(with_heads, without, strict=True))


# Sparse: layout, (B, S, H), scopes of (N, P, K, lengths), sink?
SPARSE_CASES = {
    "rows": (ROWS, (2, 2, 3), [(9, 5, 70, None)], True),
    "rows-two-tiles-of-heads": (ROWS, (1, 1, 70), [(2, 64, 33, None)], False),
    "rows-lengths": (ROWS, (3, 1, 2), [(40, 2, 130, [0, 129, 1])], True),
    "planes": (PLANES, (2, 1, 5), [(4, 53, 130, [130, 0])], True),
    "planes-second-cache": (PLANES, (3, 2, 3), [(40, 2, 130, [100, 0, 0]), (7, 20, 300, [300, 0, 1])], True),
    "planes-second-cache-of-rows-at-borders": (PLANES, (2, 1, 3), [(5, 61, 64, None), (2, 69, 64, None)], False),
    "planes-nothing": (PLANES, (1, 1, 5), [(40, 2, 64, [0]), (7, 20, 64, [0])], True),
}


def sparse_scope(
    layout: LatentLayout, B: int, S: int, N: int, P: int, K: int, lengths: list[int] | None, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Choices, a fifth of them none, from a cache that holds NaN wherever none points."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, N * P, (B, S, K), generator=g, dtype=torch.int32)
    for at, none in enumerate((*WILD, N * P)):
        rows[torch.rand(B, S, K, generator=g) < 0.05] = none
        rows[0, 0, at] = none
    lengths_B = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    counted = rows if lengths_B is None else rows.masked_fill(torch.arange(K) >= lengths_B[:, None, None], -1)
    unused = torch.ones(N * P, dtype=torch.bool)
    unused[counted[(counted >= 0) & (counted < N * P)].long()] = False
    latents = (normal(N * P, layout.width, seed=seed) / 10).clamp(-1, 1).bfloat16()
    latents[unused] = NAN
    return ops.quantize_latents(latents.view(N, P, -1)), rows, lengths_B


def sparse_case(name: str, dtype: torch.dtype) -> tuple[Tensor, list[tuple], Tensor | None]:
    layout, (B, S, H), scopes, has_sink = SPARSE_CASES[name]
    q = normal(B, H, S, layout.width, seed=9).clamp(-1, 1).to(dtype).transpose(1, 2)
    sink = None
    if has_sink:
        sink = normal(H, seed=8)
        sink[0], sink[-1] = INF, -INF
    return q, [sparse_scope(layout, B, S, *scope, seed) for seed, scope in enumerate(scopes)], sink


def sparse(q: Tensor, scopes: list[tuple], sink: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    extra = (
        dict(zip(("extra_cache_NPZ", "extra_rows_BSK", "extra_lengths_B"), *scopes[1:], strict=True))
        if scopes[1:]
        else {}
    )
    cache, rows, lengths = scopes[0]
    return ops.paged_sparse_mla_decode(q, cache, rows, 0.04, sink_H=sink, lengths_B=lengths, **extra, **options)


def sparse_loops(q: Tensor, scopes: list[tuple], sink: Tensor | None) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q.shape
    o, lse = torch.zeros(B, S, H, 512, dtype=torch.float64), torch.zeros(B, H, S, dtype=torch.float64)
    for b in range(B):
        for s in range(S):
            keys: list[Tensor] = []
            for cache, rows, lengths in scopes:
                chosen = rows[b, s, : None if lengths is None else int(lengths[b])].tolist()
                chosen = [row for row in chosen if 0 <= row < cache.shape[0] * cache.shape[1]]
                keys += dequantize_rows(cache, torch.tensor(chosen, dtype=torch.int64), torch.float64)
            for h in range(H):
                its_sink = None if sink is None else float(sink[h])
                o[b, s, h], lse[b, h, s] = attention(q[b, s, h], keys, 0.04, 512, its_sink)
    return o, lse


@pytest.mark.parametrize("name", list(SPARSE_CASES))
def test_sparse_reference(name: str) -> None:
    q, scopes, sink = sparse_case(name, torch.float64)
    with ops.use("reference"):
        got = sparse(q, scopes, sink)
    for a, b in zip(got, sparse_loops(q, scopes, sink), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", [backend for backend in SPARSE if backend != "reference"])
@pytest.mark.parametrize("name", list(SPARSE_CASES))
def test_sparse(name: str, backend: str) -> None:
    q, scopes, sink = sparse_case(name, B16)
    with ops.use("reference"):
        want = sparse(q, scopes, sink)
    with ops.use(backend):
        got = sparse(q, scopes, sink)
    assert within(got[0], want[0], MLA_SPARSE_DECODE_OUT) is None
    assert within(got[1], want[1], MLA_LSE) is None
    if sink is not None:
        assert not got[0][:, :, 0].any()


def test_dense_bad_input() -> None:
    q, cache, table, lengths = dense_case((2, 3, 1, 12, 8, 4), [9, 3], torch.float32)

    def fails(message: str, *arguments) -> None:
        with pytest.raises(ValueError, match=message):
            ops.paged_mla_decode(*arguments)

    fails(r"got \[2, 2, 3, 12\] and \[\d+, 4, 2, 12\]", q, cache.expand(-1, -1, 2, -1), table, lengths, 8)
    fails("q's dtype", q, cache.double(), table, lengths, 8)
    fails(r"v_dim must be in \[1, X\] = \[1, 12\], got 13", q, cache, table, lengths, 13)
    fails(r"int32 \[B, W\] with B = 2, got torch.int64", q, cache, table.long(), lengths, 8)
    fails(r"lengths must be int32 \[B\] = \[2\], got torch.int64", q, cache, table, lengths.long(), 8)
    fails(r"lengths must be in \[0, 16\], got 9 to 17", q, cache, table, torch.tensor([9, 17], dtype=torch.int32), 8)
    fails("must name pages in", q, cache, table, torch.tensor([9, 16], dtype=torch.int32), 8)
    other = ops.plan_splits(torch.ones(3, dtype=torch.int32), 2)
    fails("splits must be from plan_splits for B = 2", q, cache, table, lengths, 8, 0.1, False, other)
    fails("there is no backward", q.clone().requires_grad_(), cache, table, lengths, 8)


def test_sparse_bad_input() -> None:
    q, scopes, _ = sparse_case("rows", B16)
    cache, rows, _ = scopes[0]
    planes = sparse_case("planes", B16)[1][0][0]

    def fails(message: str, *arguments, **options) -> None:
        with pytest.raises(ValueError, match=message):
            ops.paged_sparse_mla_decode(*arguments, **options)

    fails("584-byte planes hold 512 dimensions", q, planes, rows)
    fails(r"rows must be int32 \[B, S, K\] with B, S = \[2, 2\], got torch.int64", q, cache, rows.long())
    fails(r"sink must be float32 \[H\] = \[3\]", q, cache, rows, sink_H=torch.zeros(2))
    fails(r"lengths must be in \[0, 70\], got 0 to 71", q, cache, rows, lengths_B=torch.tensor([0, 71]).int())
    fails("come together", q, cache, rows, extra_cache_NPZ=cache)
    fails("one layout", q, cache, rows, extra_cache_NPZ=planes, extra_rows_BSK=rows)
    fails("v_dim 513", q, cache, rows, v_dim=513)
    fails("for B = 2", q, cache, rows, splits=ops.plan_splits(torch.ones(1, dtype=torch.int32), 2))
