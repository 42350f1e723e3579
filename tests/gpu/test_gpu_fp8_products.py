"""Triton's products on a GPU, compiled, against the specification; and a projection's three products through them."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops import group_layout, quantize_fp8
from nautile.ops.fp8_linear import fp8_grouped_linear, fp8_linear
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.numerics import BF16_DIFF, FP8_DIFF, SAME_FP8_DIFF, calc_diff
from nautile.ops.reference import fp8_products as reference

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CAPABLE, reason="no GPU with FP8 products")]
ACCUMULATOR_DIFF = 1e-5
"""Beyond `SAME_FP8_DIFF`, whose sums are float32: tensor cores keep about 14 bits within each 128 of K."""
SQUARES = (128, 128)


@pytest.fixture(autouse=True)
def triton():
    with ops.use("triton"):
        yield


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def assert_close(got: Tensor, want: Tensor) -> None:
    assert torch.isfinite(got).all()
    bar = SAME_FP8_DIFF if got.dtype == torch.float32 else BF16_DIFF
    assert calc_diff(got, want) < bar + ACCUMULATOR_DIFF


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 576, 7168), (17, 333, 256), (130, 2112, 512), (4096, 4096, 7168)])
def test_dense(M: int, N: int, K: int, turned: bool, dtype: torch.dtype) -> None:
    a = quantize_fp8(normal(M, K))
    b = quantize_fp8(normal(K, N), SQUARES).t() if turned else quantize_fp8(normal(N, K), SQUARES)
    c = normal(M, N).to(dtype)
    want = reference.fp8_gemm(a, b, c.float(), torch.empty(M, N, device="cuda"))
    assert_close(ops.fp8_gemm(a, b, c), want)


@pytest.mark.parametrize("psum", [False, True])
def test_grouped(psum: bool) -> None:
    ends_G = group_layout.ends_of(torch.tensor([129, 0, 1, 300, 128], device="cuda"))
    M, N, K = 1024, 2112, 512
    groups_M = group_layout.rows_of(ends_G, M)
    a, b = quantize_fp8(normal(M, K)), quantize_fp8(normal(5, N, K), SQUARES)
    a.data.view(torch.uint8).masked_fill_(groups_M[:, None] < 0, 0x7F)
    want = reference.grouped_fp8_gemm(a, b, groups_M, torch.empty(M, N, device="cuda"), 128)
    got = ops.grouped_fp8_gemm(a, b, ends_G if psum else groups_M, psum=psum)
    assert_close(got, want)
    assert (got[groups_M < 0] == 0).all()
    x, w = normal(M, K).bfloat16(), normal(5, N, K).bfloat16()
    with ops.use("reference"):
        want = ops.grouped_gemm(x, w, groups_M)
    assert_close(ops.grouped_gemm(x, w, groups_M), want)


def test_masked() -> None:
    counts_G = torch.tensor([0, 1, 100, 128], dtype=torch.int32, device="cuda")
    a, b = quantize_fp8(normal(4, 128, 512)), quantize_fp8(normal(4, 384, 512), SQUARES)
    got = ops.masked_fp8_gemm(a, b, counts_G)
    want = reference.masked_fp8_gemm(a, b, counts_G, torch.zeros(4, 128, 384, device="cuda"))
    for g, count in enumerate(counts_G.tolist()):
        assert_close(got[g, :count], want[g, :count])


def test_k_grouped() -> None:
    ends_G = group_layout.ends_of(torch.tensor([130, 0, 50, 256], device="cuda"))
    K = group_layout.aligned(int(ends_G[-1])) + 128
    a, b, c = quantize_fp8(normal(333, K)), quantize_fp8(normal(256, K)), normal(4, 333, 256)
    padding_K = group_layout.rows_of(ends_G, K) < 0
    for x in (a, b):
        x.data.view(torch.uint8).masked_fill_(padding_K, 0x7F)
    want = reference.k_grouped_fp8_gemm(a, b, ends_G, c, torch.empty_like(c), 128)
    assert_close(ops.k_grouped_fp8_gemm(a, b, ends_G, c), want)


def test_offsets_beyond_two_billion_elements() -> None:
    M, K = 17000, 1 << 17
    data = torch.zeros(M, K, dtype=torch.uint8, device="cuda")
    data[-1] = 0x38  # 1.0
    a = Fp8Tensor(data.view(torch.float8_e4m3fn), torch.ones(M, K // 128, device="cuda"), (1, 128))
    b = Fp8Tensor(a.data[-2:], a.scale[-2:], (1, 128))
    got = ops.fp8_gemm(a, b, dtype=torch.float32)
    assert got[-1].tolist() == [0, K] and (got[:-1] == 0).all()


def test_projections() -> None:
    x = normal(300, 576).bfloat16().requires_grad_()
    w = normal(2112, 576).requires_grad_()
    dy = normal(300, 2112).bfloat16()
    y = fp8_linear(x, w)
    found = [y, *torch.autograd.grad(y, (x, w), dy)]
    plain = x.float() @ w.t()
    for got, want in zip(found, [plain, *torch.autograd.grad(plain, (x, w), dy.float())], strict=True):
        assert calc_diff(got, want) < FP8_DIFF + ACCUMULATOR_DIFF


def test_grouped_projections() -> None:
    ends_G = group_layout.ends_of(torch.tensor([200, 0, 130], device="cuda"))
    x, w = normal(640, 256).bfloat16().requires_grad_(), normal(3, 384, 256).requires_grad_()
    y = fp8_grouped_linear(x, w, ends_G)
    dy = normal(640, 384).bfloat16()
    grad_x, grad_w = torch.autograd.grad(y, (x, w), dy)
    for g, (start, stop) in enumerate(group_layout.spans(ends_G)):
        rows, d = x[start:stop].float(), dy[start:stop].float()
        for got, want in ((y[start:stop], rows @ w[g].t()), (grad_x[start:stop], d @ w[g]), (grad_w[g], d.t() @ rows)):
            assert calc_diff(got, want) < FP8_DIFF + ACCUMULATOR_DIFF
