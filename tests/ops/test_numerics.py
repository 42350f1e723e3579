"""The bars that kernels are held to: what passes, and what each says when missed."""

import pytest
import torch

from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.numerics import MLA_DENSE_OUT, Bar, calc_diff, within


def test_calc_diff_is_zero_for_equals_and_two_for_opposites() -> None:
    x = torch.randn(50)
    assert calc_diff(x, x) == 0
    assert calc_diff(x, -x) == pytest.approx(2)
    assert calc_diff(torch.zeros(3), torch.zeros(3)) == 0
    # y = (1 + e) x gives 1 − 2(1 + e) / (1 + (1 + e)²), about e² / 2
    assert calc_diff(x, 1.01 * x) == pytest.approx(0.01**2 / 2, rel=0.02)


def test_an_element_passes_by_either_bound_and_all_by_direction() -> None:
    bar = Bar(0.1, 0.01, 1.0)
    want = torch.tensor([0.0, 100.0])
    assert within(torch.tensor([0.09, 100.9]), want, bar) is None
    assert "worst 0.2 for 0" in str(within(torch.tensor([0.2, 100.9]), want, bar))
    assert "1 of 2 elements" in str(within(torch.tensor([0.0, 102.0]), want, bar))
    assert "direction" in str(within(torch.tensor([0.09, 100.9]), want, Bar(0.1, 0.01, 1e-9)))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinities_and_nan_must_agree(value: float) -> None:
    want = torch.tensor([1.0, value])
    assert within(want.clone(), want, MLA_DENSE_OUT) is None
    assert "places differ" in str(within(torch.tensor([1.0, 1.0]), want, MLA_DENSE_OUT))
    assert "places differ" in str(within(torch.tensor([value, value]), want, MLA_DENSE_OUT))
    assert "shape" in str(within(torch.ones(3), want, MLA_DENSE_OUT))


def test_fp8_tensor_dequantises_cut_blocks_and_transposes() -> None:
    data = torch.randn(2, 5, 7).to(torch.float8_e4m3fn)
    x = Fp8Tensor(data, torch.rand(2, 3, 2), (2, 4))
    for e in range(2):
        for i in range(5):
            for j in range(7):
                want = data[e, i, j].float() * x.scale[e, i // 2, j // 4]
                assert x.dequantize()[e, i, j] == want == x.t().dequantize()[e, j, i] == x[e].dequantize()[i, j]


@pytest.mark.parametrize(
    ("data", "scale", "block", "says"),
    [
        (torch.zeros(4, 4), torch.ones(4, 1), (1, 4), "float8_e4m3fn"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(4, 2), (1, 4), r"\[4, 1\].*\[4, 2\]"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(4, 1).double(), (1, 4), "float64"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(4, 1), (0, 4), "positive"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(4, 1, device="meta"), (1, 4), "meta"),
    ],
)
def test_fp8_tensor_refuses_what_does_not_fit(data, scale, block, says) -> None:
    with pytest.raises(ValueError, match=says):
        Fp8Tensor(data, scale, block)
