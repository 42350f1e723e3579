"""sparse_mla_prefill: each backend against naive float64 loops, backward against the dense masked formula."""

from dataclasses import dataclass

import pytest
import torch
from ops_cases import normal, skip_unless_it_takes
from torch import Tensor

from nautile import ops
from nautile.ops.cpu import rows as cpu_rows
from nautile.ops.dispatch import TABLE
from nautile.ops.numerics import MLA_PREFILL_LSE, MLA_PREFILL_OUT, within

BACKENDS = TABLE["sparse_mla_prefill"][1]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
WILD = (-(2**31), -123456, -2, -1, 2**31 - 1)
INF = float("inf")


@dataclass(frozen=True)
class Shape:
    S: int
    T: int
    H: int
    V: int
    R: int
    K: int
    sink: bool = False
    lengths: bool = False
    long_rows: bool = False


SHAPES = {
    "odd": Shape(5, 11, 3, 6, 3, 7),
    "sink": Shape(4, 9, 3, 5, 2, 6, sink=True),
    "lengths": Shape(7, 9, 2, 8, 4, 5, lengths=True),
    "all of it": Shape(5, 40, 17, 16, 8, 37, sink=True, lengths=True, long_rows=True),
    "more places than rows": Shape(3, 4, 2, 4, 2, 21),
    "no rotated part": Shape(3, 9, 2, 8, 0, 5, sink=True),
    "one query, head and row": Shape(1, 1, 1, 4, 2, 1),
    "no row at all": Shape(3, 0, 2, 4, 2, 3, sink=True),
    "no place": Shape(3, 5, 2, 4, 2, 0),
    "no query": Shape(0, 5, 2, 4, 2, 3, sink=True),
}


def arguments(shape: Shape, seed: int = 0) -> tuple:
    """Positional arguments of the op. The last query has only wild rows; rows 2 and T − 1 are NaN, and nobody's."""
    g = torch.Generator().manual_seed(seed)
    S, T, K = shape.S, shape.T, shape.K
    q, kv = normal(g, S, shape.H, shape.V + shape.R), normal(g, T, shape.V + shape.R)
    named = [t for t in range(T) if T < 4 or t not in (2, T - 1)]
    choice = (torch.rand(S, max(K, len(named)), generator=g)).argsort(-1)[:, :K]
    pool = torch.tensor(named + [WILD[i % len(WILD)] for i in range(max(K, len(named)) - len(named))] + [T] * (K == 0))
    rows = pool[choice]
    if S > 1 and K:
        rows[-1] = torch.tensor([*WILD, T])[torch.randint(0, 6, (K,), generator=g)]
    if T >= 4:
        kv[[2, T - 1]] = float("nan")
    lengths = None
    if shape.lengths:
        lengths = torch.randint(0, K + 1, (S,), generator=g, dtype=torch.int32)
        lengths[0], lengths[1] = 0, K + 5
    sink = normal(g, shape.H) if shape.sink else None
    if sink is not None and shape.H > 1:
        sink[0], sink[1] = INF, -INF
    return q, kv, rows.to(torch.int64 if shape.long_rows else torch.int32), 0.4, shape.V, sink, lengths


def naive(q, kv, rows, scale, v_dim, sink=None, lengths=None) -> tuple[Tensor, Tensor, Tensor]:
    S, H, _ = q.shape
    out, largest, lse = torch.zeros(S, H, v_dim).double(), torch.full((S, H), -INF), torch.full((S, H), INF)
    largest, lse = largest.double(), lse.double()
    for s in range(S):
        count = rows.shape[1] if lengths is None else min(int(lengths[s]), rows.shape[1])
        chosen = [int(r) for r in rows[s, :count] if 0 <= r < kv.shape[0]]
        for h in range(H):
            if chosen:
                scores = scale * (kv[chosen] @ q[s, h])
                largest[s, h], lse[s, h] = scores.max(), scores.exp().sum().log()
                total = lse[s, h] if sink is None else torch.logaddexp(lse[s, h], sink[h])
                out[s, h] = (scores - total).exp() @ kv[chosen, :v_dim]
    return out, largest, lse


def dense(q, kv, rows, scale, v_dim, sink=None, lengths=None) -> Tensor:
    """Softmax over all rows with the count of each as weight; float64 autograd differentiates it."""
    T, K = kv.shape[0], rows.shape[1]
    places = torch.arange(K) if lengths is None else torch.where(torch.arange(K) < lengths[:, None], 0, 1 << 40)
    count = ((rows.long() + places * (lengths is not None))[..., None] == torch.arange(T)).sum(1)  # [S, T]
    kv = kv.where(~kv.isnan(), 0.0)
    weights = count[:, None] * torch.exp(scale * torch.einsum("shx,tx->sht", q, kv))
    total = weights.sum(-1) + (0.0 if sink is None else sink.exp())
    return torch.einsum("sht,tv->shv", weights, kv[:, :v_dim]) / total.where(total > 0, 1.0)[..., None]


def cast(inputs: tuple, dtype: torch.dtype) -> tuple:
    q, kv, rows, scale, v_dim, sink, lengths = inputs
    return q.to(dtype), kv.to(dtype), rows, scale, v_dim, None if sink is None else sink.to(dtype), lengths


def leaves(inputs: tuple) -> list[Tensor]:
    return [x.requires_grad_() for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]


def gradients(function, inputs: tuple) -> list[Tensor]:
    inputs = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in inputs)
    to = leaves(inputs)
    o = function(*inputs)
    g = torch.Generator().manual_seed(9)
    return [x for x in torch.autograd.grad(o, to, normal(g, *o.shape).to(o.dtype), allow_unused=True) if x is not None]


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    finite = want.isfinite()
    assert torch.equal(got[~finite].double(), want[~finite])
    worst = (got.double() - want)[finite].abs().max().item() if finite.any() else 0.0
    assert worst <= tolerance * max(1.0, want[finite].abs().max().item() if finite.any() else 0.0), worst


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two queries of "odd", of "all of it" one at a time: small inputs take several blocks, the last one partial."""
    monkeypatch.setattr(cpu_rows, "GATHERED_NUMBERS", 200)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f64", "f32"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(SHAPES))
def test_equals_the_naive_loop(name: str, backend: str, dtype: torch.dtype) -> None:
    skip_unless_it_takes("sparse_mla_prefill", backend, dtype)
    inputs = arguments(SHAPES[name])
    with ops.use(backend):
        got = ops.sparse_mla_prefill(*cast(inputs, dtype))
    assert [x.dtype for x in got] == [dtype] * 3
    for a, b in zip(got, naive(*inputs), strict=True):
        assert_close(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f64", "f32"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(SHAPES))
def test_gradients_are_those_of_the_dense_masked_formula(
    name: str, backend: str, dtype: torch.dtype, deterministic: bool
) -> None:
    skip_unless_it_takes("sparse_mla_prefill", backend, dtype)
    if deterministic and backend == "reference":
        pytest.skip("nothing to choose there")
    inputs = arguments(SHAPES[name])
    want = gradients(dense, inputs)
    torch.use_deterministic_algorithms(deterministic)  # torch.empty then returns NaN
    try:
        with ops.use(backend):
            got = gradients(lambda *a: ops.sparse_mla_prefill(*a)[0], cast(inputs, dtype))
    finally:
        torch.use_deterministic_algorithms(False)
    for which, (a, b) in enumerate(zip(got, want, strict=True)):
        if which == 2:  # an infinite sink has no gradient; exp overflows in the dense formula
            b = b.where(inputs[5].isfinite(), 0.0)
        assert a.dtype == dtype
        assert_close(a, b, TOLERANCE[dtype])


def official(S: int = 6, T: int = 50, H: int = 20, K: int = 40) -> tuple:
    """Widths in the proportion of DeepSeek-V3.2 and the spread of FlashMLA's own tests."""
    q, kv, rows, _, _, sink, lengths = arguments(Shape(S, T, H, 64, 8, K, sink=True, lengths=True))
    return (q / 10 + 0.02).bfloat16(), (kv / 10 - 0.03).bfloat16(), rows, 72**-0.5, 64, sink.float(), lengths


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_within_the_official_bars(backend: str) -> None:
    inputs = official()
    want = naive(*cast(inputs, torch.float64))
    with ops.use(backend):
        out, largest, lse = ops.sparse_mla_prefill(*inputs)
    assert out.dtype == torch.bfloat16 and largest.dtype == lse.dtype == torch.float32
    assert within(out, want[0], MLA_PREFILL_OUT) is None
    assert within(largest, want[1], MLA_PREFILL_LSE) is None
    assert within(lse, want[2], MLA_PREFILL_LSE) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_gradients(backend: str) -> None:
    inputs = official()
    exact = cast(inputs, torch.float64)
    want = gradients(dense, exact)
    with ops.use(backend):
        got = gradients(lambda *a: ops.sparse_mla_prefill(*a)[0], inputs)
    assert [x.dtype for x in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for a, b in zip(got, (*want[:2], want[2].where(exact[5].isfinite(), 0.0)), strict=True):
        assert (a.double() - b).norm() <= 0.01 * b.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_lowers_and_gradients_stay_wide(backend: str) -> None:
    inputs = cast(arguments(SHAPES["sink"]), torch.float32)
    exact = cast(inputs, torch.float64)
    want = gradients(dense, exact)
    with ops.use(backend), torch.autocast("cpu", torch.bfloat16):
        assert ops.sparse_mla_prefill(*inputs)[0].dtype == torch.bfloat16
        got = gradients(lambda *a: ops.sparse_mla_prefill(*a)[0], inputs)
    for a, b in zip(got, (*want[:2], want[2].where(exact[5].isfinite(), 0.0)), strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_frozen_sides_and_statistics_without_gradient(backend: str) -> None:
    q, kv, rows, scale, v_dim, sink, _ = cast(arguments(SHAPES["sink"]), torch.float32)
    wide_rows = torch.stack([rows, rows.flip(1)], -1)[..., 0]
    strided = (q.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([kv, kv], -1)[:, : kv.shape[1]])
    with ops.use(backend):
        want = ops.sparse_mla_prefill(q, kv, rows, scale, v_dim, sink)
        got = ops.sparse_mla_prefill(*strided, wide_rows, scale, v_dim, sink)
        frozen = ops.sparse_mla_prefill(q, kv.clone().requires_grad_(), rows, scale, v_dim)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert frozen[0].requires_grad and not frozen[1].requires_grad and not frozen[2].requires_grad
    frozen[0].sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["odd", "sink", "lengths", "no rotated part"])
def test_gradcheck(name: str, backend: str) -> None:
    q, kv, rows, scale, v_dim, sink, lengths = arguments(SHAPES[name])
    kv = kv.where(~kv.isnan(), 0.0)
    to = [q.requires_grad_(), kv.requires_grad_()]
    if sink is not None:
        to.append(sink.where(sink.isfinite(), 0.3).requires_grad_())

    def out(q, kv, sink=None) -> Tensor:
        return ops.sparse_mla_prefill(q, kv, rows, scale, v_dim, sink, lengths)[0]

    with ops.use(backend):
        assert torch.autograd.gradcheck(out, to)


def test_what_the_cpu_gathers_at_once_does_not_grow_with_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """All gathered rows would be 12 MiB here."""
    monkeypatch.setattr(cpu_rows, "GATHERED_NUMBERS", 1 << 16)
    g = torch.Generator().manual_seed(0)
    q, kv = normal(g, 256, 4, 48).float().requires_grad_(), normal(g, 300, 48).float().requires_grad_()
    rows = torch.randint(0, 300, (256, 256), generator=g, dtype=torch.int32)
    with ops.use("cpu"), torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:  # fmt: skip
        ops.sparse_mla_prefill(q, kv, rows, 0.2, 32)[0].sum().backward()
    assert max(event.cpu_memory_usage for event in profile.events() or []) <= 8 * (4 << 16)


def test_places_written_apart_in_several_passes_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from nautile.ops.triton import rows

    inputs = cast(arguments(SHAPES["all of it"]), torch.float32)

    def run() -> list[Tensor]:
        with ops.use("triton"):
            return gradients(lambda *a: ops.sparse_mla_prefill(*a)[0], inputs)

    torch.use_deterministic_algorithms(True)
    try:
        once = run()
        monkeypatch.setattr(rows, "APART_NUMBERS", 37 * 24 * 2)
        apart = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(once, apart, strict=True))


def test_a_row_named_twice_counts_twice() -> None:
    q, kv = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[1.0, 0.0], [4.0, 0.0]])
    for backend in BACKENDS:
        with ops.use(backend):
            out, _, lse = ops.sparse_mla_prefill(q, kv, torch.tensor([[0, 1, 1]]), 1.0, 1)
        torch.testing.assert_close(out, torch.tensor([[[3.0]]]))
        torch.testing.assert_close(lse, torch.tensor([[3.0]]).log())


def called(**changed) -> None:
    right = {"q_SHX": torch.ones(3, 2, 6), "kv_TX": torch.ones(5, 6), "rows_SK": torch.zeros(3, 4).int(), "scale": 1.0}
    ops.sparse_mla_prefill(**(right | {"v_dim": 4} | changed))


WRONG = [
    ({"q_SHX": torch.ones(3, 6)}, r"q and kv must be \[S, H, X\]"),
    ({"kv_TX": torch.ones(5, 7)}, r"got \[3, 2, 6\], \[5, 7\]"),
    ({"kv_TX": torch.ones(5, 6).long()}, "floating point"),
    ({"v_dim": 7}, "from 1 to 6"),
    ({"v_dim": 0}, "got 0"),
    ({"rows_SK": torch.zeros(2, 4).int()}, r"S = 3, got torch.int32 \[2, 4\]"),
    ({"rows_SK": torch.zeros(3, 4)}, "int32 or int64"),
    ({"sink_H": torch.zeros(3)}, r"\[H\] = \[2\]"),
    ({"sink_H": torch.zeros(2).int()}, "sink must be floating"),
    ({"topk_length_S": torch.zeros(2).int()}, r"\[S\] = \[3\]"),
    ({"topk_length_S": torch.zeros(3)}, "topk_length must be int32"),
    ({"kv_TX": torch.ones(5, 6, device="meta")}, "one device"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_wrong_arguments_are_named(changed: dict, message: str) -> None:
    called()
    with pytest.raises(ValueError, match=message):
        called(**changed)
