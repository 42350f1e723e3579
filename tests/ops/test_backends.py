"""Every backend of every op against naive float64 loops, forward and backward."""

from functools import cache

import ops_naive as naive
import pytest
import torch
from ops_cases import CASES, Case, skip_unless_it_takes
from torch import Tensor

from nautile import ops
from nautile.ops.cpu import onednn
from nautile.ops.dispatch import TABLE

BACKENDS = [(case, backend) for case in CASES for backend in TABLE[case.op][1]]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def run(function, arguments: tuple, dtype: torch.dtype) -> list[Tensor]:
    """Output, then the gradient of each floating argument that has one, for a fixed upstream gradient."""
    inputs = [
        a.detach().to(dtype).requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    if function.__name__.startswith("rotate_"):  # angles come from positions; nobody differentiates them
        inputs[1:] = [a.detach() for a in inputs[1:]]
    y = function(*inputs)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y.backward(upstream.to(y.dtype))
    leaves = [a for a in inputs if isinstance(a, Tensor) and a.requires_grad]
    return [y.detach(), *(torch.zeros_like(a) if a.grad is None else a.grad for a in leaves)]


@cache
def wanted(case: Case) -> list[Tensor]:
    """What the naive loop makes of the case: most of the time these tests take."""
    return run(getattr(naive, case.op), case.make(torch.Generator().manual_seed(0)), torch.float64)


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    assert len(got) == len(want)
    for which, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        assert torch.isfinite(a).all(), f"tensor {which}"
        worst = (a.double() - b).abs().max().item() if a.numel() else 0.0
        assert worst <= tolerance * max(1.0, b.abs().max().item() if b.numel() else 0.0), f"tensor {which}: {worst}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("case", "backend"), BACKENDS, ids=str)
def test_equals_the_naive_loop(case: Case, backend: str, dtype: torch.dtype) -> None:
    skip_unless_it_takes(case.op, backend, dtype)
    arguments = case.make(torch.Generator().manual_seed(0))
    want = wanted(case)
    with ops.use(backend):
        got = run(getattr(ops, case.op), arguments, dtype)
    assert got[0].dtype == dtype
    assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize(("case", "backend"), BACKENDS, ids=str)
def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients(case: Case, backend: str) -> None:
    arguments = case.make(torch.Generator().manual_seed(0))
    want = wanted(case)
    with ops.use(backend), torch.autocast("cpu", torch.bfloat16):
        got = run(getattr(ops, case.op), arguments, torch.float32)
    # A loss, and three that keep their input's dtype.
    wide = ("linear_cross_entropy", "swiglu", "rotate_interleaved", "rotate_half_split")
    assert got[0].dtype == (torch.float32 if case.op in wide else torch.bfloat16)
    assert all(gradient.dtype == torch.float32 for gradient in got[1:])
    # By norm, not by element: one element that cancels may be off by several roundings.
    for which, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.double() - b).norm() <= 0.02 * b.norm() + 1e-12, f"tensor {which}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_that_nobody_wrote_is_not_read(case: Case) -> None:
    """torch.empty returns NaN here: a buffer used before it is written would show."""
    arguments = case.make(torch.Generator().manual_seed(0))
    want = wanted(case)
    torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory, the default
    try:
        got = run(getattr(ops, case.op), arguments, torch.float64)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(got, want, TOLERANCE[torch.float64])


def test_onednn_is_not_given_weights_with_gaps() -> None:
    """It multiplies them right, but a thousand times slower."""
    x, weight = torch.ones(64, 32), torch.ones(16, 64)[:, :32]
    assert not onednn.suits(x, weight)
    assert onednn.suits(x, weight.contiguous()) == onednn.takes(torch.float32)
    assert not onednn.suits(x[:1], weight.contiguous())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("case", "backend"), BACKENDS, ids=str)
def test_without_gradients_equals_the_naive_loop(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Ops may take another path when nobody asks for a backward; its buffers start as NaN here, too."""
    skip_unless_it_takes(case.op, backend, dtype)
    arguments = case.make(torch.Generator().manual_seed(0))
    want = wanted(case)[0]
    inputs = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    torch.use_deterministic_algorithms(True)
    try:
        with ops.use(backend), torch.inference_mode():
            got = getattr(ops, case.op)(*inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert got.dtype == dtype
    assert_close([got], [want], TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["grouped-several-blocks", "grouped-documents", "documents-over-blocks"])
def test_attention_with_room_for_few_heads_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if (case.op, case.name) == ("causal_attention", name))
    arguments = case.make(torch.Generator().manual_seed(0))
    monkeypatch.setattr("nautile.ops.cpu.attention._BUFFER", 8 * 131 * 3)
    assert_close([ops.causal_attention(*arguments)], [naive.causal_attention(*arguments)], TOLERANCE[torch.float64])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_inputs_same_bits(case: Case) -> None:
    arguments = case.make(torch.Generator().manual_seed(0))
    runs = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            runs.append(run(getattr(ops, case.op), arguments, torch.float32))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("name", ["odd"])
@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_gradcheck(op: str, name: str) -> None:
    case = next(case for case in CASES if (case.op, case.name) == (op, name))
    arguments = case.make(torch.Generator().manual_seed(0))
    inputs = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() and (op, i) not in ANGLES else a
        for i, a in enumerate(arguments)
    ]
    with ops.use("cpu"):
        assert torch.autograd.gradcheck(getattr(ops, op), inputs, fast_mode=True)


ANGLES = {(op, i) for op in ("rotate_interleaved", "rotate_half_split") for i in (1, 2)}


@pytest.mark.parametrize("frozen", [0, 1])
def test_loss_with_one_side_frozen(frozen: int) -> None:
    x, weight, targets, chunk = loss_arguments()
    sides = [x.requires_grad_(frozen != 0), weight.requires_grad_(frozen != 1)]
    ops.linear_cross_entropy(*sides, targets, chunk).backward()
    assert sides[frozen].grad is None
    assert sides[1 - frozen].grad is not None


def test_loss_without_gradients_equals_loss_with() -> None:
    x, weight, targets, chunk = loss_arguments()
    with torch.no_grad():
        plain = ops.linear_cross_entropy(x, weight, targets, chunk)
    assert plain == ops.linear_cross_entropy(x.requires_grad_(), weight, targets, chunk)


def loss_arguments() -> tuple:
    case = next(case for case in CASES if str(case) == "linear_cross_entropy-ignored")
    return case.make(torch.Generator().manual_seed(0))
