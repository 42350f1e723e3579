"""FP8 quantisers: a loop over a table of all e4m3 numbers, every backend bit for bit, and no bias."""

import math

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops.dispatch import TABLE, implementation
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.numerics import FP8_DIFF, calc_diff

BACKENDS = TABLE["quantize_fp8"][1]
BLOCKS = [
    ((1, 128), (5, 200)),
    ((128, 1), (130, 7)),
    ((128, 128), (130, 200)),
    ((1, 20), (2, 3, 50)),
    ((32, 32), (2, 33, 64)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Blocks of very different sizes: rows grow tenfold, and one is zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x *= 10.0 ** (torch.arange(shape[-2]) % 5 - 2)[:, None]
    x[..., shape[-2] // 2, :] = 0
    return x.to(dtype)


def e4m3_numbers() -> list[float]:
    """By its definition: 4 bits of exponent with bias 7, 3 of mantissa, no infinity; the code's order."""
    small = [m / 8 * 2**-6 for m in range(8)]
    return small + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]


def nearest_e4m3(x: float, numbers: list[float]) -> float:
    """Of two that are equally near, the one with an even code."""
    code = min(range(len(numbers)), key=lambda i: (abs(numbers[i] - abs(x)), i % 2))
    return math.copysign(numbers[code], x)


def same_bits(got: Fp8Tensor, want: Fp8Tensor) -> bool:
    return (
        got.block == want.block
        and got.data.is_contiguous()
        and torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
        and torch.equal(got.scale, want.scale)
    )


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("block", [(1, 4), (3, 1), (3, 3)], ids=str)
def test_equals_a_loop_over_blocks(block: tuple[int, int], ue8m0: bool) -> None:
    x, numbers, (r, c) = normal(7, 10, seed=3), e4m3_numbers(), block
    assert len(numbers) == 127 and numbers[-1] == 448
    got = ops.quantize_fp8(x, block, ue8m0)
    for i in range(0, 7, r):
        for j in range(0, 10, c):
            part, found = x[i : i + r, j : j + c], got.data[i : i + r, j : j + c].float()
            scale = float(got.scale[i // r, j // c])
            exact = max(1e-4, float(part.abs().max())) / 448
            assert scale == pytest.approx(2.0 ** math.ceil(math.log2(exact)) if ue8m0 else exact, rel=1e-6)
            inverse = torch.tensor(1.0) / torch.tensor(scale)
            want = [[nearest_e4m3(float(v * inverse), numbers) for v in row] for row in part]
            assert found.tolist() == want


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("block", "shape"), BLOCKS, ids=str)
def test_triton_gives_the_same_bits(block: tuple[int, int], shape: tuple[int, ...], transpose: bool) -> None:
    pytest.importorskip("triton")
    for dtype, ue8m0 in zip(DTYPES, (False, True, False), strict=True):
        x = normal(*shape, dtype=dtype)
        want = ops.quantize_fp8(x, block, ue8m0, transpose)
        with ops.use("triton"):
            got = ops.quantize_fp8(x, block, ue8m0, transpose)
            assert same_bits(got, want)
            assert torch.equal(ops.dequantize_fp8(got, dtype), want.dequantize(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    pytest.importorskip("triton")
    x = normal(140, 70, dtype=torch.bfloat16)
    with ops.use(backend):
        want = ops.quantize_fp8(x.t().contiguous())
        assert same_bits(ops.quantize_fp8(x.t()), want)
        assert same_bits(ops.quantize_fp8(x, transpose=True), want)
        gaps = torch.full((70, 300), torch.nan, dtype=torch.bfloat16)[:, 7:287:2].copy_(x.t())
        assert same_bits(ops.quantize_fp8(gaps), want)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_requantised_transpose(backend: str, ue8m0: bool) -> None:
    pytest.importorskip("triton")
    x = ops.quantize_fp8(normal(140, 150, dtype=torch.bfloat16), ue8m0=ue8m0)
    with ops.use(backend):
        got = ops.requantize_transposed(x, ue8m0)
    assert same_bits(got, ops.quantize_fp8(x.dequantize(), (1, 128), ue8m0, transpose=True))
    if ue8m0:  # what a power of two does not push below the smallest e4m3 number stays as it is
        numbers, kept = x.dequantize().t(), got.dequantize()
        large = numbers.abs() >= got.scale.repeat_interleave(128, 1)[:, :140] * 2**-6
        assert torch.equal(kept[large], numbers[large])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_nothing_out(backend: str) -> None:
    pytest.importorskip("triton")
    with ops.use(backend):
        for shape in ((0, 128), (3, 0), (0, 2, 5)):
            got = ops.quantize_fp8(torch.empty(shape))
            assert got.shape == shape
            assert ops.dequantize_fp8(got).shape == shape


def test_numbers_of_the_size_of_the_largest_float_saturate() -> None:
    x = torch.tensor([[3.4e38, -3.4e38, 1.0, 0.0]])
    for ue8m0 in (False, True):
        got = ops.quantize_fp8(x, (1, 4), ue8m0)
        assert got.data.float().abs().max() <= 448
        assert torch.isfinite(got.scale).all()
        assert got.dequantize()[0, 2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("ue8m0", [False, True])
def test_error_is_what_the_official_bar_allows(ue8m0: bool) -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    for block in ((1, 128), (128, 128), (128, 1)):
        assert calc_diff(ops.quantize_fp8(x, block, ue8m0).dequantize(), x) < FP8_DIFF


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_has_no_bias(backend: str) -> None:
    """As many numbers grow as shrink, within four standard deviations of a fair coin; and as many magnitudes, where
    they are evenly spread between two neighbours.
    """
    pytest.importorskip("triton")
    x = torch.rand(256, 512, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with ops.use(backend):
        change = ops.quantize_fp8(x).dequantize().double() - x.double()
    up, down = int((change > 0).sum()), int((change < 0).sum())
    assert abs(up - down) < 4 * math.sqrt(up + down)
    larger = int((change * x > 0).sum())
    assert abs(2 * larger - up - down) < 4 * math.sqrt(up + down)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_does_not_vanish(bad: float, backend: str) -> None:
    """Where nobody looks at the values, as on a GPU, it shows in its block's numbers, and in no other's."""
    pytest.importorskip("triton")
    x = torch.ones(3, 256)
    x[1, 130] = bad
    with ops.use(backend):
        back = Fp8Tensor(*implementation("quantize_fp8", x)(x, (1, 128), False), (1, 128)).dequantize()
    assert not back[1, 130].isfinite()
    back[1, 128:] = 1
    assert torch.equal(back, torch.ones(3, 256))


def test_no_graph_is_kept() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    got = ops.quantize_fp8(x, (1, 4))
    assert not got.data.requires_grad
    assert not got.scale.requires_grad


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.ones(4),), r"x must be \[..., R, C\] .* got torch.float32 \[4\]"),
        ((torch.ones(4, 4, dtype=torch.float64),), "got torch.float64"),
        ((torch.ones(4, 4), (2, 3)), r"block must be \(1, c\), \(r, 1\) or \(r, r\), got \(2, 3\)"),
        ((torch.ones(4, 4), (0, 1)), r"got \(0, 1\)"),
        ((torch.tensor([[1.0, torch.nan]]),), r"x \[1, 2\] holds NaN or infinity"),
        ((torch.tensor([[1.0, -torch.inf]]),), "holds NaN or infinity"),
    ],
)
def test_what_it_refuses(arguments: tuple, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ops.quantize_fp8(*arguments)


def test_what_the_others_refuse() -> None:
    x = ops.quantize_fp8(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16 or float16, got torch.int32"):
        ops.dequantize_fp8(x, torch.int32)
    x.scale[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"scale .* holds NaN or infinity"):
        ops.requantize_transposed(x)
