"""Projections in FP8: all three products near the unquantised ones, what is kept, and how tiny gradients fare."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops import group_layout, quantize_fp8
from nautile.ops.dispatch import TABLE
from nautile.ops.fp8_linear import fp8_grouped_linear, fp8_linear, fp8_linears
from nautile.ops.numerics import FP8_DIFF, SAME_FP8_DIFF, calc_diff
from nautile.ops.quantization import requantize_transposed

BACKENDS = [backend for backend in TABLE["fp8_gemm"][1] if backend != "hopper"]
NAN = float("nan")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    with ops.use(request.param):
        yield request.param


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).requires_grad_()


def gradients(y: Tensor, *leaves: Tensor, size: float = 1.0) -> list[Tensor]:
    """Of the sum over y times fixed numbers about as large as `size`."""
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)) * size
    return list(torch.autograd.grad(y, leaves, upstream.to(y.dtype)))


def assert_near(got: Tensor, want: Tensor, bar: float = FP8_DIFF) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.isfinite(got).all()
    assert calc_diff(got, want) < bar


SHAPES = [((3, 41), 192, 300), ((1,), 128, 128), ((7,), 20, 130), ((), 64, 5), ((0,), 128, 16)]


@pytest.mark.parametrize(("rows", "D", "O"), SHAPES, ids=str)
def test_all_three_products_are_within_the_official_bar(backend: str, rows: tuple[int, ...], D: int, O: int) -> None:  # noqa: E741
    x, w, b = normal(*rows, D), normal(O, D, seed=1), normal(O, seed=2)
    y, want = fp8_linear(x, w, b), torch.nn.functional.linear(x, w, b)
    assert_near(y, want)
    for got, right in zip(gradients(y, x, w, b), gradients(want, x, w, b), strict=True):
        assert_near(got, right)


def test_products_are_those_of_the_recipe() -> None:
    """Activations in 1 × 128 with powers of two, turned in the backward pass; weights in squares; gradients once."""
    x, w = normal(256, 128), normal(384, 128, seed=1)
    y = fp8_linear(x, w)
    grad_x, grad_w = gradients(y, x, w)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    x8, w8 = quantize_fp8(x, ue8m0=True), quantize_fp8(w, (128, 128))
    assert torch.equal(y, ops.fp8_gemm(x8, w8, dtype=torch.float32))
    assert_near(grad_x, ops.fp8_gemm(quantize_fp8(dy), w8.t(), dtype=torch.float32), SAME_FP8_DIFF)
    turned = requantize_transposed(x8, ue8m0=True)
    assert_near(grad_w, ops.fp8_gemm(quantize_fp8(dy, transpose=True), turned, dtype=torch.float32), SAME_FP8_DIFF)


def test_several_weights_share_one_input(backend: str) -> None:
    x, v, w = normal(30, 200), normal(70, 200, seed=1), normal(129, 200, seed=2)
    together, apart = fp8_linears(x, v, w), (fp8_linear(x, v), fp8_linear(x, w))
    for got, want in zip(together, apart, strict=True):
        assert torch.equal(got, want)
    got = gradients(torch.cat(together, 1), x, v, w)
    want = gradients(torch.cat(apart, 1), x, v, w)
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])
    assert_near(got[0], want[0], SAME_FP8_DIFF)


@pytest.mark.parametrize("size", [1e-9, 1e-30, 1e30])
def test_gradients_of_any_size_keep_their_direction(size: float) -> None:
    """Of a loss over millions of tokens all gradients are below what activations are clamped to."""
    x, w = normal(64, 128), normal(96, 128, seed=1)
    for got, want in zip(
        gradients(fp8_linear(x, w), x, w, size=size), gradients(x @ w.t(), x, w, size=size), strict=True
    ):
        assert_near(got / size, want / size)


def test_no_gradient_is_no_nan() -> None:
    x, w = normal(8, 128), normal(16, 128, seed=1)
    for grad in gradients(fp8_linear(x, w), x, w, size=0.0):
        assert (grad == 0).all()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of numpy in the interpreter
@pytest.mark.parametrize("wrong", [NAN, float("inf")])
def test_what_is_not_finite_stays_so(backend: str, wrong: float) -> None:
    x, w = normal(5, 128), normal(16, 128, seed=1)
    x.data[2, 3] = wrong
    y = fp8_linear(x, w)
    assert not y[2].isfinite().any() and y[[0, 1, 3, 4]].isfinite().all()
    assert not gradients(y, w)[0].isfinite().all()


def test_autocast_gives_bfloat16_and_float32_gradients() -> None:
    x, w = normal(40, 192), normal(100, 192, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8_linear(x, w)
    assert y.dtype == torch.bfloat16
    want = x @ w.t()
    for got, right in zip(gradients(y, x, w), gradients(want, x, w), strict=True):
        assert_near(got, right)


def test_activations_are_kept_in_a_byte_per_number() -> None:
    x, w = normal(256, 512, dtype=torch.bfloat16), normal(128, 512, seed=1)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_linear(x, w)
    of_x = [t for t in kept if 256 in t.shape]
    assert sum(t.nbytes for t in of_x) == 256 * 512 + 256 * 4 * 4  # numbers, and a float32 for 128 of them


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_side_frozen(frozen: int) -> None:
    sides = [normal(20, 128), normal(30, 128, seed=1)]
    sides[frozen].requires_grad_(False)
    fp8_linear(*sides).sum().backward()
    assert sides[frozen].grad is None
    assert sides[1 - frozen].grad is not None


def test_no_gradient_no_graph() -> None:
    with torch.inference_mode():
        assert fp8_linear(normal(4, 64), normal(8, 64)).shape == (4, 8)


@pytest.mark.parametrize("counts", [[5, 0, 200, 130], [0, 0], [128], [1, 300]], ids=str)
def test_grouped(backend: str, counts: list[int]) -> None:
    G, D, O = len(counts), 72, 90  # noqa: E741
    ends_G = group_layout.ends_of(torch.tensor(counts))
    R = int(ends_G[-1]) + 17
    padding = (group_layout.rows_of(ends_G, R) < 0)[:, None]
    x, w = normal(R, D), normal(G, O, D, seed=1)
    x.data.masked_fill_(padding, NAN)
    y = fp8_grouped_linear(x, w, ends_G)
    assert (y[padding[:, 0]] == 0).all()
    dy = torch.randn(R, O, generator=torch.Generator().manual_seed(9)).masked_fill(padding, NAN)
    grad_x, grad_w = torch.autograd.grad(y, (x, w), dy)
    want_y, want_x, want_w = torch.zeros(R, O), torch.zeros(R, D), torch.zeros(G, O, D)
    with torch.no_grad():
        for g, (start, stop) in enumerate(group_layout.spans(ends_G)):
            want_y[start:stop] = x[start:stop] @ w[g].t()
            want_x[start:stop] = dy[start:stop] @ w[g]
            want_w[g] = dy[start:stop].t() @ x[start:stop]
    for got, want in zip((y, grad_x, grad_w), (want_y, want_x, want_w), strict=True):
        assert_near(got, want)
    assert all((grad_w[g] == 0).all() for g, count in enumerate(counts) if not count)


def test_grouped_equals_each_group_alone() -> None:
    counts, D, O = [128, 256], 128, 64  # noqa: E741
    ends_G = group_layout.ends_of(torch.tensor(counts))
    x, w = normal(384, D), normal(2, O, D, seed=1)
    y = fp8_grouped_linear(x, w, ends_G)
    alone = torch.cat([fp8_linear(part, w[g]) for g, part in enumerate(x.split(counts))])
    assert torch.equal(y, alone)
    for got, want in zip(gradients(y, x, w), gradients(alone, x, w), strict=True):
        assert_near(got, want, SAME_FP8_DIFF)


def test_backends_agree() -> None:
    pytest.importorskip("triton")
    x, w, ends_G = normal(256, 130), normal(2, 40, 130, seed=1), torch.tensor([100, 129], dtype=torch.int32)
    found = []
    for backend in BACKENDS:
        with ops.use(backend):
            y = fp8_grouped_linear(x, w, ends_G)
            found.append([y, *gradients(y, x, w)])
    for got, want in zip(*found, strict=True):
        assert_near(got, want, SAME_FP8_DIFF)


def test_compiled_is_one_graph_with_the_same_numbers() -> None:
    torch._dynamo.reset()
    ends_G = torch.tensor([100, 129], dtype=torch.int32)

    def layer(x: Tensor, v: Tensor, w: Tensor, stack: Tensor) -> Tensor:
        y, z = fp8_linears(x, v, w)
        return fp8_grouped_linear(y * z, stack, ends_G)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    leaves = normal(256, 70), normal(40, 70, seed=1), normal(40, 70, seed=2), normal(2, 30, 40, seed=3)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, want = compiled(*leaves), layer(*leaves)
        assert torch.equal(got, want) and got.dtype == want.dtype
        for a, b in zip(gradients(got, *leaves), gradients(want, *leaves), strict=True):
            assert_near(a, b, SAME_FP8_DIFF if not autocast else FP8_DIFF)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: fp8_linear(normal(3, 64), normal(5, 65)),
            "weights [O, D], got [3, 64] and [5, 65]",
        ),
        (lambda: fp8_linear(normal(3, 64).double(), normal(5, 64)), "x must be bfloat16 or float32"),
        (lambda: fp8_grouped_linear(normal(3, 64), normal(5, 64), None), "want x [R, D] and weights [G, O, D]"),
        (
            lambda: fp8_grouped_linear(normal(3, 64), normal(2, 5, 64), torch.tensor([1, 2])),
            "ends must be int32 [2], got torch.int64 [2]",
        ),
        (
            lambda: fp8_grouped_linear(normal(3, 64), normal(1, 5, 64), torch.tensor([1], dtype=torch.int32), 16),
            "alignment must be a positive multiple of 128, got 16",
        ),
    ],
)
def test_bad_input_is_told(call, told: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert told in str(error.value)
