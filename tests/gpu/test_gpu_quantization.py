"""Quantisers, selection and token rows on a GPU, compiled, at shapes that training has: the bits of the reference."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.routing import row_map

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CAPABLE, reason="no GPU with FP8")]
DEVICES = ("cuda", "cpu")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def assert_same_bits(got: Fp8Tensor, want: Fp8Tensor) -> None:
    assert torch.equal(got.scale.cpu(), want.scale)
    assert torch.equal(got.data.cpu().view(torch.uint8), want.data.view(torch.uint8))


def both(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.cuda(), x


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize(
    ("block", "shape", "transpose"),
    [
        ((1, 128), (4096, 7168), False),
        ((1, 128), (4096, 7168), True),
        ((1, 128), (1, 576), False),
        ((128, 1), (130, 333), False),
        ((128, 128), (3, 2112, 1536), False),
        ((1, 7168), (17, 7168), False),
    ],
)
def test_fp8(block: tuple[int, int], shape: tuple[int, ...], transpose: bool, ue8m0: bool) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x = (torch.randn(shape) * 10.0 ** (torch.arange(shape[-2]) % 9 - 4)[:, None]).to(dtype)
        got, want = (ops.quantize_fp8(z, block, ue8m0, transpose) for z in both(x))
        assert_same_bits(got, want)
        assert torch.equal(ops.dequantize_fp8(got).cpu(), ops.dequantize_fp8(want))
        assert_same_bits(ops.requantize_transposed(got, ue8m0), ops.requantize_transposed(want, ue8m0))


def test_infinity_and_nan_do_not_vanish() -> None:
    """Nobody looks at the values there; what is not finite must show in the numbers or in their scale."""
    for bad in (torch.inf, -torch.inf, torch.nan):
        x = torch.ones(4, 256, device="cuda")
        x[2, 130] = bad
        back = ops.quantize_fp8(x).dequantize()
        assert not back[2, 128:].isfinite().all()
        assert back[:, :128].isfinite().all()
        assert back[[0, 1, 3]].isfinite().all()


def test_twelve_bits() -> None:
    got, want = (ops.quantize_e5m6(z) for z in both(torch.randn(1000, 7168).bfloat16()))
    assert torch.equal(got.data.cpu(), want.data)
    assert torch.equal(got.scale.cpu(), want.scale)
    assert torch.equal(ops.dequantize_e5m6(got).cpu(), ops.dequantize_e5m6(want))


@pytest.mark.parametrize("packed", [False, True])
def test_scales_for_a_tma(packed: bool) -> None:
    got, want = (ops.mn_major_scales(z, packed) for z in both(torch.ldexp(torch.ones(4097, 56), torch.arange(56))))
    assert torch.equal(got.cpu(), want)
    assert got.stride() == want.stride()


@pytest.mark.parametrize("T", [1, 4096, 1000])
def test_swiglu(T: int) -> None:
    """Exponentials may differ in their last bit, and a number beside a boundary be rounded the other way."""
    gate_up, dy, weight = torch.randn(T, 4096).bfloat16(), torch.randn(T, 2048).bfloat16(), torch.rand(T)
    found = []
    for device in DEVICES:
        g, d, w = gate_up.to(device), dy.to(device), weight.to(device)
        back = ops.swiglu_quantize_backward(d, g, w)
        y = [ops.swiglu_quantize(g, w, transpose=transpose) for transpose in (False, True)]
        found.append(([*y, back.rows, back.columns], back.weight_T.cpu()))
    for got, want in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(got.scale.cpu(), want.scale, rtol=1e-5, atol=0)
        torch.testing.assert_close(got.dequantize().cpu(), want.dequantize(), rtol=0.13, atol=1e-4)
        assert (got.data.cpu().view(torch.uint8) != want.data.view(torch.uint8)).float().mean() < 0.01
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize(("E", "k", "n_group", "topk_group"), [(256, 8, 8, 4), (160, 6, 8, 3), (64, 6, 1, 1)])
def test_selection(E: int, k: int, n_group: int, topk_group: int, group_score: str) -> None:
    for scores in (torch.randn(4096, E), torch.randint(-2, 3, (4096, E)) * -0.5):
        got, want = (ops.topk_gate(z, k, n_group, topk_group, group_score) for z in both(scores))
        assert torch.equal(got.cpu(), want)


def test_rows_of_tokens() -> None:
    experts = torch.rand(2000, 64).argsort(1)[:, :6].masked_fill(torch.rand(2000, 6) < 0.1, -1)
    x, dx, dy = torch.randn(2000, 2048), torch.randn(2000, 2048), torch.rand(2000, 6)
    found = []
    for device in DEVICES:
        rows = row_map(experts.to(device), 64, 128)
        z, w = x.to(device).requires_grad_(), dy.to(device).requires_grad_()
        y = ops.combine_tokens(ops.permute_tokens(z, rows).sin(), rows, w)
        y.backward(dx.to(device))
        found.append([rows.choice_R, rows.row_TK, rows.ends_E, y.detach(), z.grad, w.grad])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
