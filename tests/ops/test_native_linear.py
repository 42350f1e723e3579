"""Projections of a few bfloat16 rows in native code: against float64, on every kind of processor, and when they run."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nautile import ops
from nautile.core import jit
from nautile.ops.cpu import projection

pytestmark = pytest.mark.skipif(jit.why_no_cxx() is not None, reason=str(jit.why_no_cxx()))

PROCESSORS = {
    "this": (),
    "avx512-without-bf16": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
    "plain": ("-march=x86-64",),
}
SHAPES = [(7, 5), (32, 128), (65, 131), (1, 1), (33, 260)]
ROWS = (1, 2, 3, 4, 7, 13, 25, 48)


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(projection.__file__).parent / "native"
    headers = (folder / "rows.h", folder / "panels.h", folder / "lanes.h")
    library = jit.load_cxx(folder / "projection.cpp", *headers, flags=PROCESSORS[request.param])
    monkeypatch.setattr(projection, "_library", lambda: projection.declared(library))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_within_one_rounding(got: Tensor, want: Tensor, magnitude: Tensor) -> None:
    """Sums in float32 are off by little of the sum of magnitudes, the result by half a unit of its last place."""
    assert got.dtype == torch.bfloat16
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= 2.0**-8 * want.abs() + 2e-6 * magnitude).all()


def sums(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A product in float64, and that of the magnitudes."""
    return x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T


@pytest.mark.usefixtures("processor")
def test_linear_is_right_to_one_rounding() -> None:
    for outputs, D in SHAPES:
        weight, bias = normal(outputs, D), normal(outputs, seed=1)
        for rows in ROWS:
            x = normal(rows, D, seed=2)
            want, magnitude = sums(x, weight)
            assert_within_one_rounding(projection.linear(x, weight), want, magnitude)
            wanted = want + bias.double()
            assert_within_one_rounding(projection.linear(x, weight, bias), wanted, magnitude + bias.double().abs())


@pytest.mark.usefixtures("processor")
def test_gated_linear_is_right_to_one_rounding() -> None:
    """Between the products and the result, nothing is rounded to bfloat16."""
    for outputs, D in SHAPES:
        gate, up = normal(outputs, D), normal(outputs, D, seed=1)
        for rows in ROWS:
            x = normal(rows, D, seed=2)
            (g, g_size), (u, u_size) = sums(x, gate), sums(x, up)
            want = F.silu(g) * u
            magnitude = want.abs() + 1.1 * g_size * u.abs() + F.silu(g).abs() * u_size
            assert_within_one_rounding(projection.gated_linear(x, gate, up), want, magnitude)


@pytest.mark.usefixtures("processor")
def test_silu_far_from_zero() -> None:
    gate = torch.tensor([[-1e4], [-200.0], [-90.0], [-20.0], [0.0], [20.0], [200.0], [1e4]]).bfloat16()
    got = projection.gated_linear(torch.ones(1, 1).bfloat16(), gate, torch.ones(8, 1).bfloat16())
    want = F.silu(gate.double()).T
    assert ((got.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-30).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 3, 14])
def test_gaps_and_threads(rows: int, threads: int) -> None:
    """Rows of x and of a weight may be parts of longer ones, x may have any strides."""
    both = normal(300, 2 * 140)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for x in (normal(rows, 280)[:, ::2], normal(140, rows).t(), normal(rows, 150)[:, 7:147]):
                got = ops.linear(x, both[:, 140:])
                assert_within_one_rounding(got, *sums(x, both[:, 140:]))
                assert torch.equal(got, ops.linear(x.contiguous(), both[:, 140:].contiguous()))
                gated = ops.gated_linear(x[:, None], *both.split(140, 1))
                assert gated.shape == (rows, 1, 300)
                assert torch.equal(gated[:, 0], ops.gated_linear(x.clone(), *(w.clone() for w in both.split(140, 1))))
    finally:
        torch.set_num_threads(before)


def test_each_row_is_what_it_is_alone_up_to_the_last_place() -> None:
    weight, x = normal(65, 300), normal(20, 300, seed=1)
    together = projection.linear(x, weight).double()
    alone = torch.cat([projection.linear(row[None], weight) for row in x]).double()
    assert ((together - alone).abs() <= 2.0**-7 * alone.abs() + 1e-5).all()


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("rows", [1, 5])
def test_nothing_is_read_or_written_outside(rows: int) -> None:
    """NaN around x and the weight must not get in, marks around y must stay."""
    outputs, D = 35, 71
    x = torch.full((rows + 2, D), float("nan"), dtype=torch.bfloat16)[1:-1].copy_(normal(rows, D))
    weight = torch.full((outputs + 2, D), float("nan"), dtype=torch.bfloat16)[1:-1].copy_(normal(outputs, D, seed=1))
    marks = torch.full((rows * outputs + 200,), 77.0, dtype=torch.bfloat16)
    y = marks[100:-100].view(rows, outputs)
    projection._library().linear_bf16(x.data_ptr(), D, weight.data_ptr(), D, None, y.data_ptr(), rows, outputs, D, 1)
    assert_within_one_rounding(y, *sums(x, weight))
    assert (marks[:100] == 77).all()
    assert (marks[-100:] == 77).all()


def test_native_code_runs_for_few_rows_without_gradients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    native = projection._native_linear
    monkeypatch.setattr(projection, "_native_linear", lambda *a: calls.append(a[0].shape[0]) or native(*a))
    weight = normal(8, 16)
    with torch.no_grad():
        for rows in (0, 1, projection.FEW, projection.FEW + 1):
            ops.linear(normal(rows, 16), weight)
        ops.linear(normal(2, 16).float(), weight.float())
        with torch.autocast("cpu", torch.bfloat16):
            ops.linear(normal(2, 16).float(), weight.float())
    assert calls == [1, projection.FEW]
    ops.linear(normal(2, 16), weight.requires_grad_())
    ops.linear(normal(2, 16).requires_grad_(), weight.detach())
    assert calls == [1, projection.FEW]
    monkeypatch.setattr(jit, "why_no_cxx", lambda: "no C++ compiler found")
    ops.linear(normal(2, 16), weight.detach())
    assert calls == [1, projection.FEW]
