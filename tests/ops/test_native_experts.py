"""The mixture of a few tokens in C++ against the specification, with each instruction set that can be played here."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.core import jit
from nautile.ops.cpu import expert_decode, packed_mixture

pytestmark = pytest.mark.skipif(jit.why_no_cxx() is not None, reason=str(jit.why_no_cxx()))

INSTRUCTIONS = {
    "native": (),
    "avx512": ("-mno-avx512bf16", "-O1"),
    "avx2": ("-mno-avx512f", "-O1"),
    "plain": ("-march=x86-64", "-O1"),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6}

# T, E, D, F, K: whole vectors and none, one portion of rows and several, one token per expert and many.
SHAPES = [(1, 8, 64, 96, 3), (1, 4, 7, 5, 2), (5, 3, 40, 33, 2), (9, 2, 70, 37, 1), (3, 6, 1, 1, 6)]


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    T, E, D, F, K = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=g).to(dtype)
    gate_up = (torch.randn(E, 2 * F, D, generator=g) * D**-0.5).to(dtype)
    down = (torch.randn(E, D, F, generator=g) * F**-0.5).to(dtype)
    experts = torch.rand(T, E, generator=g).topk(K).indices
    return x, gate_up, down, experts, torch.rand(T, K, generator=g)


def assert_near(got: Tensor, arguments: tuple[Tensor, ...]) -> None:
    x, gate_up, down, experts, weights = arguments
    with ops.use("reference"):
        want = ops.grouped_swiglu(x.double(), gate_up.double(), down.double(), experts, weights.double())
    assert got.dtype == x.dtype
    worst = (got.double() - want).abs().max().item()
    assert worst <= TOLERANCE[got.dtype] * max(1.0, want.abs().max().item()), worst


@pytest.fixture
def always_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_decode, "MOST_PER_EXPERT", 100)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", list(INSTRUCTIONS))
def test_equals_the_reference(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, always_native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_decode, "FLAGS", INSTRUCTIONS[name])
    arguments = make(shape, dtype)
    assert expert_decode.takes(*arguments[:4])
    assert_near(ops.grouped_swiglu(*arguments), arguments)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f32", "bf16"])
def test_experts_nobody_chose_may_hold_anything(dtype: torch.dtype) -> None:
    x, gate_up, down, _, weights = make((2, 6, 33, 20, 2), dtype)
    experts = torch.tensor([[4, 1], [1, 1]])  # the sum of both entries is meant where an expert stands twice
    want = ops.grouped_swiglu(x, gate_up, down, experts, weights)
    assert_near(want, (x, gate_up, down, experts, weights))
    for e in (0, 2, 3, 5):
        gate_up[e], down[e] = float("nan"), float("nan")
    assert torch.equal(ops.grouped_swiglu(x, gate_up, down, experts, weights), want)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f32", "bf16"])
def test_views_and_any_number_of_threads_give_the_same_bits(dtype: torch.dtype, always_native: None) -> None:
    x, gate_up, down, experts, weights = make((4, 5, 64, 70, 2), dtype)
    want = ops.grouped_swiglu(x, gate_up, down, experts, weights)
    x = torch.cat([x, x * float("nan")], 1)[:, :64]
    gate_up = torch.stack([gate_up, gate_up * float("nan")], 2)[:, :, 0]
    experts, weights = experts.t().contiguous().t(), weights.t().contiguous().t()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ops.grouped_swiglu(x, gate_up, down, experts, weights), want)
    finally:
        torch.set_num_threads(before)


def test_many_tokens_per_expert_a_gradient_and_other_dtypes_run_as_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("native code was called")

    monkeypatch.setattr(expert_decode, "mixture", never)
    for arguments in (
        make((40, 4, 16, 8, 2), torch.float32),
        tuple(x.double() if x.is_floating_point() else x for x in make((1, 4, 16, 8, 2), torch.float32)),
        tuple(x.requires_grad_() if x.is_floating_point() else x for x in make((1, 4, 16, 8, 2), torch.float32)),
    ):
        ops.grouped_swiglu(*arguments)
    with pytest.raises(AssertionError):
        ops.grouped_swiglu(*make((1, 4, 16, 8, 2), torch.float32))


def test_no_tokens() -> None:
    x, gate_up, down, experts, weights = make((1, 4, 16, 8, 2), torch.float32)
    assert ops.grouped_swiglu(x[:0], gate_up, down, experts[:0], weights[:0]).shape == (0, 16)


PACKED = [(1, 4, 64, 96, 3, "bf16", "bf16"), (5, 3, 70, 33, 2, "int8", "int4"), (60, 2, 20, 40, 2, "int4", "bf16")]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f32", "bf16"])
@pytest.mark.parametrize("case", PACKED, ids=str)
@pytest.mark.parametrize("name", ["native", "avx2"])
def test_packed_experts_equal_the_reference(
    name: str, case: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halves that end within a panel, two kinds in one mixture, more tokens than are multiplied at once."""
    monkeypatch.setattr(packed_mixture, "FLAGS", INSTRUCTIONS[name])
    *shape, up_kind, down_kind = case
    x, gate_up, down, experts, weights = make(tuple(shape), torch.float32)
    packed = ops.pack_weight(gate_up, up_kind), ops.pack_weight(down, down_kind)
    with ops.use("cpu"):
        got = ops.packed_experts(x.to(dtype), *packed, experts, weights)
    assert_near(got, (x.to(dtype), *(p.unpack(torch.float64) for p in packed), experts, weights))
    with ops.use("reference"):
        want = ops.packed_experts(x.to(dtype).double(), *packed, experts, weights.double())
        assert want.dtype == torch.float64
        assert_near(
            ops.packed_experts(x.to(dtype), *packed, experts, weights),
            (x.to(dtype), *(p.unpack(torch.float64) for p in packed), experts, weights),
        )


def test_packed_experts_nobody_chose_may_hold_anything_and_gradients_reach_x_and_weights() -> None:
    x, gate_up, down, experts, weights = make((2, 6, 33, 20, 2), torch.float32)
    up, down_packed = ops.pack_weight(gate_up), ops.pack_weight(down)
    experts = torch.tensor([[4, 1], [1, 1]])
    want = ops.packed_experts(x, up, down_packed, experts, weights)
    for e in (0, 2, 3, 5):
        up.data[e], down_packed.data[e] = float("nan"), float("nan")
    assert torch.equal(ops.packed_experts(x, up, down_packed, experts, weights), want)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    ops.packed_experts(x, up, down_packed, experts, weights).sum().backward()
    assert x.grad is not None and weights.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TD": torch.ones(2, 4)}, "gate_up"),
        ({"down": ops.pack_weight(torch.ones(2, 3, 5))}, "down must"),
        ({"experts_TK": torch.zeros(2, 1)}, "int64"),
        ({"weights_TK": torch.ones(2, 2)}, "weights"),
        ({"experts_TK": torch.full((2, 1), 7)}, r"in \[0, 2\)"),
    ],
    ids=str,
)
def test_wrong_arguments_of_packed_experts_are_named(change: dict, message: str) -> None:
    arguments = {
        "x_TD": torch.ones(2, 3),
        "gate_up": ops.pack_weight(torch.ones(2, 8, 3)),
        "down": ops.pack_weight(torch.ones(2, 3, 4)),
        "experts_TK": torch.zeros(2, 1, dtype=torch.int64),
        "weights_TK": torch.ones(2, 1),
    }
    with pytest.raises(ValueError, match=message):
        ops.packed_experts(**arguments | change)
