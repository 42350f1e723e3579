"""SwiGLU in FP8 against autograd in float64, and Triton against the reference."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nautile import ops
from nautile.ops.dispatch import TABLE
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.numerics import FP8_DIFF, calc_diff

BACKENDS = TABLE["swiglu_quantize"][1]


def inputs(T: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Gates and ups, the gradient of y, a weight per token."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(T, 2 * width, generator=generator) * 3
    grad = torch.randn(T, width, generator=generator) * 1e-2
    return gate_up.to(dtype), grad.to(dtype), torch.rand(T, generator=generator) + 0.1


def steps_apart(got: Fp8Tensor, want: Fp8Tensor) -> Tensor:
    """How many e4m3 numbers lie between each two; scales must agree but for the last bits of exp."""
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-5, atol=0)
    assert got.data.is_contiguous() and got.shape == want.shape

    def order(x: Tensor) -> Tensor:
        code = x.view(torch.uint8).int()
        return torch.where(code < 128, code, 128 - code)

    return (order(got.data) - order(want.data)).abs()


def assert_same(got: Fp8Tensor, want: Fp8Tensor) -> None:
    apart = steps_apart(got, want)
    assert not apart.numel() or (apart.max() <= 1 and apart.float().mean() < 0.01)


@pytest.mark.parametrize("weighted", [False, True])
def test_formula_and_gradients(weighted: bool) -> None:
    gate_up, dy, weight = inputs(150, 256, torch.float32)
    g, u = (x.requires_grad_() for x in gate_up.double().chunk(2, -1))
    w = weight.double().requires_grad_()
    y = F.silu(g) * u * (w[:, None] if weighted else 1)
    y.backward(dy.double())
    given = weight if weighted else None
    for transpose in (False, True):
        got = ops.swiglu_quantize(gate_up, given, transpose=transpose).dequantize()
        assert calc_diff(got.t() if transpose else got, y) < FP8_DIFF
    got = ops.swiglu_quantize_backward(dy, gate_up, given)
    want = torch.cat([g.grad, u.grad], -1)
    assert calc_diff(got.rows.dequantize(), want) < FP8_DIFF
    assert calc_diff(got.columns.dequantize(), want.t()) < FP8_DIFF
    if weighted:
        torch.testing.assert_close(got.weight_T.double(), w.grad, rtol=1e-4, atol=1e-6)
    else:
        assert got.weight_T is None


@pytest.mark.parametrize(("dtype", "ue8m0", "weighted"), [(torch.bfloat16, False, True), (torch.float32, True, False)])
@pytest.mark.parametrize("T", [1, 130])
def test_triton_equals_the_reference(T: int, dtype: torch.dtype, ue8m0: bool, weighted: bool) -> None:
    pytest.importorskip("triton")
    gate_up, dy, weight = inputs(T, 256, dtype, seed=T)
    gate_up[0, :] = -100  # σ is 0 there
    given = weight if weighted else None
    found = {}
    for backend in ("reference", "triton"):
        with ops.use(backend):
            y = [ops.swiglu_quantize(gate_up, given, ue8m0, transpose) for transpose in (False, True)]
            found[backend] = (*y, ops.swiglu_quantize_backward(dy, gate_up, given, ue8m0))
    for got, want in zip(found["triton"][:2], found["reference"][:2], strict=True):
        assert_same(got, want)
    got, want = found["triton"][2], found["reference"][2]
    assert_same(got.rows, want.rows)
    assert_same(got.columns, want.columns)
    if weighted:
        torch.testing.assert_close(got.weight_T, want.weight_T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_no_tokens(backend: str) -> None:
    pytest.importorskip("triton")
    gate_up, dy, weight = inputs(9, 128, torch.bfloat16)
    with ops.use(backend):
        want = ops.swiglu_quantize_backward(dy, gate_up, weight)
        got = ops.swiglu_quantize_backward(
            dy.t().contiguous().t(), gate_up.repeat(1, 2)[:, :256], weight.repeat_interleave(2)[::2]
        )
        assert_same(got.rows, want.rows)
        assert_same(got.columns, want.columns)
        assert_same(ops.swiglu_quantize(gate_up.t().contiguous().t(), weight), ops.swiglu_quantize(gate_up, weight))
        assert ops.swiglu_quantize(gate_up[:0], transpose=True).shape == (128, 0)
        none = ops.swiglu_quantize_backward(dy[:0], gate_up[:0], weight[:0])
        assert none.columns.shape == (256, 0)
        assert none.weight_T.shape == (0,)


def test_what_they_refuse() -> None:
    gate_up, dy, weight = inputs(3, 128, torch.float32)
    with pytest.raises(ValueError, match=r"F a multiple of 128, got torch.float32 \[3, 200\]"):
        ops.swiglu_quantize(gate_up[:, :200])
    with pytest.raises(ValueError, match=r"weight must be float32 \[3\], got torch.float64 \[3\]"):
        ops.swiglu_quantize(gate_up, weight.double())
    with pytest.raises(ValueError, match=r"grad must be \[3, 128\] .* got torch.float32 \[2, 128\]"):
        ops.swiglu_quantize_backward(dy[:2], gate_up)
    dy[1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"grad \[3, 128\] holds NaN or infinity"):
        ops.swiglu_quantize_backward(dy, gate_up)
