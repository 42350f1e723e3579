"""Packed weights: what packing keeps, and products with them against float64, on every kind of processor."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.core import jit
from nautile.ops import dispatch
from nautile.ops.cpu import packed

KINDS = ("bf16", "int8", "int4")
PROCESSORS = {
    "this": (),
    "avx512-without-bf16": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
    "plain": ("-march=x86-64",),
}
"""Flags that leave out instructions which this processor may have."""
native = pytest.mark.skipif(jit.why_no_cxx() is not None, reason=str(jit.why_no_cxx()))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7, 5), (32, 128), (65, 131), (1, 1), (3, 33, 70), (2, 2, 5, 9)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_unpacking_gives_back_what_was_packed(kind: str, shape: tuple[int, ...]) -> None:
    weight = normal(*shape)
    p = ops.pack_weight(weight, kind)
    assert p.shape == shape
    got = p.unpack(torch.float64)
    if kind == "bf16":
        assert torch.equal(got, weight.bfloat16().double())
    else:
        assert torch.equal(got, rounded(weight.double(), kind, p.group))


def rounded(weight: Tensor, kind: str, group: int) -> Tensor:
    """Number by number, as `pack_weight` says it."""
    out = torch.zeros_like(weight)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in weight.shape[:-1])).view(-1, weight.dim() - 1):
        row = weight[tuple(index)]
        for start in range(0, len(row), group):
            numbers = row[start : start + group].float()
            largest = numbers[numbers.abs().argmax()]
            scale = largest.abs() / 127 if kind == "int8" else largest / -8
            limits = (-127, 127) if kind == "int8" else (-8, 7)
            whole = (numbers / scale).round().clamp(*limits)
            out[tuple(index)][start : start + group] = whole.double() * scale.double()
    return out


@pytest.mark.parametrize(("kind", "error"), [("bf16", 0.002), ("int8", 0.007), ("int4", 0.1)])
def test_quantisation_costs_what_its_bits_say(kind: str, error: float) -> None:
    weight = normal(64, 512)
    assert (ops.pack_weight(weight, kind).unpack() - weight).norm() < error * weight.norm()


def test_bytes_of_a_packed_weight() -> None:
    weight = normal(64, 512)
    assert [ops.pack_weight(weight, kind).nbytes * 8 / weight.numel() for kind in KINDS] == [16, 8.25, 4.5]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_zeros_stay_zeros(kind: str) -> None:
    p = ops.pack_weight(torch.zeros(3, 9), kind)
    assert torch.equal(p.unpack(), torch.zeros(3, 9))
    assert torch.equal(ops.packed_linear(torch.ones(2, 9), p), torch.zeros(2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_of_a_stack(kind: str) -> None:
    weight = normal(3, 33, 70)
    p = ops.pack_weight(weight, kind)
    assert torch.equal(p[1].unpack(), p.unpack()[1])
    assert p[1].data.data_ptr() == p.data[1].data_ptr()
    x = normal(2, 70).bfloat16()
    assert torch.equal(ops.packed_linear(x, p[2]), ops.packed_linear(x, ops.pack_weight(weight[2], kind)))
    with pytest.raises(IndexError, match="no stack"):
        p[0][0]


SHAPES = [(7, 5), (32, 128), (65, 131), (1, 1), (33, 644)]
ROWS = (1, 2, 7, 13, 25, 49)


def assert_within_one_rounding(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Sums in float32 are off by little of the sum of magnitudes, the result by half a unit of its last place."""
    want, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        want, magnitude = want + bias.double(), magnitude + bias.double().abs()
    unit = 2.0**-8 if got.dtype == torch.bfloat16 else 0.0
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= unit * want.abs() + 2e-6 * magnitude).all()


@native
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_right_to_one_rounding(kind: str, processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native_library(PROCESSORS[processor])
    monkeypatch.setattr(packed, "_library", lambda: library)
    for outputs, D in SHAPES:
        weight, bias = ops.pack_weight(normal(outputs, D), kind), normal(outputs, seed=1)
        for rows in ROWS if D > 100 else ROWS[:2]:
            for dtype in (torch.bfloat16, torch.float32):
                x = normal(rows, D, seed=2).to(dtype)
                with ops.use("cpu"):
                    got = ops.packed_linear(x, weight, bias)
                assert got.dtype == dtype
                assert_within_one_rounding(got, x, weight.unpack(torch.float64), bias)


def native_library(flags: tuple[str, ...]):
    folder = Path(packed.__file__).parent / "native"
    headers = (folder / "panels.h", folder / "lanes.h")
    return packed.declared(jit.load_cxx(folder / "packed.cpp", *headers, flags=flags))


@pytest.mark.parametrize("backend", dispatch.TABLE["packed_linear"][1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_backend_equals_the_formula(backend: str, dtype: torch.dtype) -> None:
    example = torch.zeros(1, dtype=dtype)
    with ops.use(backend):
        if dispatch._module("packed_linear", backend).why_not(example.device, dtype):
            pytest.skip("not for this dtype, or no compiler")
        weight, x = ops.pack_weight(normal(21, 38), "int8"), normal(3, 2, 38).to(dtype)
        got = ops.packed_linear(x, weight)
    assert got.dtype == dtype
    assert_within_one_rounding(got.flatten(0, 1), x.flatten(0, 1), weight.unpack(torch.float64), None)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_with_gaps_no_rows_and_threads(threads: int) -> None:
    weight = ops.pack_weight(normal(300, 260), "int4")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x in (normal(5, 520)[:, ::2], normal(260, 5).t(), normal(5, 300)[:, 7:267], normal(1, 260).expand(60, 260)):
            x = x.bfloat16() if x.shape[0] == 5 else x
            assert torch.equal(ops.packed_linear(x, weight), ops.packed_linear(x.clone(), weight))
            assert_within_one_rounding(ops.packed_linear(x, weight), x, weight.unpack(torch.float64), None)
        assert ops.packed_linear(torch.empty(0, 260), weight).shape == (0, 300)
        assert ops.packed_linear(torch.empty(260), weight).shape == (300,)
        assert ops.packed_linear(torch.empty(2, 0, 260), weight).shape == (2, 0, 300)
    finally:
        torch.set_num_threads(before)


@native
def test_nothing_is_written_or_read_outside() -> None:
    """NaN around x must not get in, marks around y must stay."""
    weight = ops.pack_weight(normal(35, 71), "bf16")
    for rows in (1, 3, 14):
        around = torch.full((rows * 71 + 200,), float("nan"), dtype=torch.bfloat16)
        x = around[100:-100].view(rows, 71).copy_(normal(rows, 71))
        marks = torch.full((rows * 35 + 200,), 77.0, dtype=torch.bfloat16)
        y = marks[100:-100].view(rows, 35)
        packed._library().packed_linear_bf16(
            16, weight.data.data_ptr(), None, 0, x.data_ptr(), 71, None, y.data_ptr(), rows, 35, 71, 1
        )
        assert_within_one_rounding(y, x, weight.unpack(torch.float64), None)
        assert (marks[:100] == 77).all()
        assert (marks[-100:] == 77).all()


def test_nan_and_infinity_pass_through_their_row_only() -> None:
    weight = ops.pack_weight(normal(35, 70), "int8")
    x = normal(3, 70).bfloat16()
    x[1, 69] = float("nan")
    y = ops.packed_linear(x, weight)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_gradients_of_x_and_bias() -> None:
    weight, x, bias = ops.pack_weight(normal(6, 9), "int8"), normal(4, 9).double(), normal(6).double()
    inputs = x.clone().requires_grad_(), bias.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: ops.packed_linear(x, weight, b), inputs)
    x32 = x.float().requires_grad_()
    ops.packed_linear(x32, weight).sum().backward()
    torch.testing.assert_close(x32.grad, weight.unpack().sum(0).expand(4, 9))


def test_autocast_multiplies_in_bfloat16() -> None:
    weight, x = ops.pack_weight(normal(6, 9), "int8"), normal(4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.packed_linear(x, weight)
    assert y.dtype == torch.bfloat16
    assert_within_one_rounding(y, x.bfloat16(), weight.unpack(torch.float64), None)


def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "why_no_cxx", lambda: "no C++ compiler found")
    assert packed.why_not(torch.device("cpu"), torch.float32) == "no C++ compiler found"


WRONG = [
    (lambda: ops.pack_weight(torch.ones(3)), r"floating \[..., O, D\]"),
    (lambda: ops.pack_weight(torch.ones(3, 4).int()), "floating"),
    (lambda: ops.pack_weight(torch.ones(3, 0)), "not empty"),
    (lambda: ops.pack_weight(torch.ones(3, 4), "int3"), "bf16, int8, int4"),
    (lambda: ops.pack_weight(torch.ones(3, 4), "int8", group=6), "multiple of 4"),
    (lambda: ops.pack_weight(torch.ones(3, 4), "bf16", group=8), "no scales"),
    (lambda: ops.pack_weight(torch.tensor([[1.0, float("nan")]]), "int4"), "NaN or infinity"),
    (lambda: ops.packed_linear(torch.ones(2, 4), ops.pack_weight(torch.ones(2, 3, 4))), "one matrix"),
    (lambda: ops.packed_linear(torch.ones(2, 5), ops.pack_weight(torch.ones(3, 4))), r"x \[..., 4\]"),
    (
        lambda: ops.packed_linear(torch.ones(2, 4), ops.pack_weight(torch.ones(3, 4)), torch.ones(2)),
        r"bias must be \[3",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_arguments_of_packing_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
