"""FP8 products: every backend against float64 sums block by block, at odd sizes and with garbage where nobody looks."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops import group_layout, quantize_fp8
from nautile.ops.dispatch import TABLE
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.numerics import BF16_DIFF, FP8_DIFF, SAME_FP8_DIFF, calc_diff

BACKENDS = [backend for backend in TABLE["fp8_gemm"][1] if backend != "hopper"]  # which has tests of its own
SQUARES = (128, 128)
NAN = float("nan")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    with ops.use(request.param):
        yield


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory, the default
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def numbers(x: Fp8Tensor) -> Tensor:
    """Every number times the scale of its block, in float64."""
    (r, c), (R, C) = x.block, x.shape
    out = torch.empty(R, C, dtype=torch.float64)
    for i in range(R):
        for j in range(0, C, c):
            out[i, j : j + c] = x.data[i, j : j + c].double() * x.scale[i // r, j // c].double()
    return out


def poison(x: Fp8Tensor, data: Tensor, scale: Tensor) -> None:
    """NaN in the numbers and scales where the masks say so."""
    x.data.view(torch.uint8).masked_fill_(data, 0x7F)
    x.scale.masked_fill_(scale, NAN)


def naive(a: Fp8Tensor, b: Fp8Tensor) -> Tensor:
    """Sum of the blocks of K, each promoted: the formula."""
    x, y = numbers(a), numbers(b)
    return sum(
        (x[:, k : k + 128] @ y[:, k : k + 128].t() for k in range(0, x.shape[1], 128)),
        start=torch.zeros(len(x), len(y), dtype=torch.float64),
    )


def assert_same(got: Tensor, want: Tensor) -> None:
    """The bar of bfloat16's rounding for bfloat16 results; that of another order of sums for float32."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert calc_diff(got, want) < (SAME_FP8_DIFF if got.dtype == torch.float32 else BF16_DIFF)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("block", [SQUARES, (1, 128)], ids=["squares", "rows"])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 128), (37, 150, 256), (130, 64, 384), (0, 5, 128), (5, 0, 128), (3, 4, 0)]
)
def test_dense(M: int, N: int, K: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    a, b = quantize_fp8(normal(M, K)), quantize_fp8(normal(N, K, seed=1), block)
    got = ops.fp8_gemm(a, b, dtype=dtype)
    assert got.dtype == dtype
    assert_same(got, naive(a, b))


def test_dense_is_within_the_official_bar_of_the_unquantised_product() -> None:
    x, w = normal(64, 512), normal(96, 512, seed=1)
    got = ops.fp8_gemm(quantize_fp8(x), quantize_fp8(w, SQUARES))
    assert 0 < calc_diff(got, x.double() @ w.double().t()) < FP8_DIFF


def test_same_inputs_same_bits() -> None:
    a, b = quantize_fp8(normal(33, 512)), quantize_fp8(normal(70, 512, seed=1), SQUARES)
    first = ops.fp8_gemm(a, b)
    assert all(torch.equal(ops.fp8_gemm(a, b), first) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_adds_c_and_writes_out(dtype: torch.dtype) -> None:
    a, b, c = quantize_fp8(normal(20, 256)), quantize_fp8(normal(30, 256, seed=1), SQUARES), normal(20, 30).to(dtype)
    want = naive(a, b) + c.double()
    wide = torch.full((20, 47), NAN, dtype=dtype)
    out = wide[:, 5:35]
    assert ops.fp8_gemm(a, b, c, out) is out
    assert_same(out, want)
    assert wide[:, :5].isnan().all() and wide[:, 35:].isnan().all()
    assert_same(ops.fp8_gemm(a, b, c), want)  # of c's dtype
    out = c.clone()
    ops.fp8_gemm(a, b, out, out)
    assert_same(out, want)


def test_transposed_operands_need_no_copy() -> None:
    """B [K, N] of a product with a weight's transpose, and A that was quantised along its columns."""
    a, b = quantize_fp8(normal(256, 20), (128, 1)).t(), quantize_fp8(normal(256, 30, seed=1), SQUARES).t()
    assert not a.data.is_contiguous() and a.block == (1, 128)
    assert_same(ops.fp8_gemm(a, b, dtype=torch.float32), naive(a, b))


GROUPS = [[5, 0, 20, 16], [0, 0, 3], [0, 0], [33, 0, 0], [16]]


@pytest.mark.parametrize("psum", [False, True], ids=["rows", "psum"])
@pytest.mark.parametrize("counts", GROUPS, ids=str)
def test_grouped(counts: list[int], psum: bool) -> None:
    G, N, K = len(counts), 40, 256
    ends_G = group_layout.ends_of(torch.tensor(counts), 16)
    M = group_layout.aligned(int(ends_G[-1]), 16) + 16  # and a tile without a group
    groups_M = group_layout.rows_of(ends_G, M, 16)
    a, b = quantize_fp8(normal(M, K)), quantize_fp8(normal(G, N, K), SQUARES)
    poison(a, groups_M[:, None] < 0, groups_M[:, None] < 0)
    got = ops.grouped_fp8_gemm(a, b, ends_G if psum else groups_M, dtype=torch.float32, psum=psum, alignment=16)
    want = torch.zeros(M, N, dtype=torch.float64)
    for m, g in enumerate(groups_M.tolist()):
        if g >= 0:
            want[m] = naive(Fp8Tensor(a.data[m : m + 1], a.scale[m : m + 1], a.block), b[g])[0]
    assert_same(got, want)
    assert (got[groups_M < 0] == 0).all()


def test_groups_in_any_order_and_a_last_tile_cut_short() -> None:
    groups_M = torch.tensor([2] * 16 + [0] * 3 + [-1] * 13 + [2] * 5, dtype=torch.int32)
    a, b = quantize_fp8(normal(37, 128)), quantize_fp8(normal(3, 20, 128), SQUARES)
    got = ops.grouped_fp8_gemm(a, b, groups_M, alignment=16)
    every = torch.stack([naive(a, b[g]) for g in range(3)])
    want = every[groups_M.clamp(min=0).long(), torch.arange(37)] * (groups_M >= 0)[:, None]
    assert_same(got, want)


@pytest.mark.parametrize("counts", [[5, 0, 21], [0, 0, 0], [21, 1, 20]], ids=str)
def test_masked(counts: list[int]) -> None:
    a, b = quantize_fp8(normal(3, 21, 256)), quantize_fp8(normal(3, 40, 256, seed=1), SQUARES)
    out = torch.full((3, 21, 40), 7.0)
    unused = torch.arange(21)[:, None] >= torch.tensor(counts)[:, None, None]
    poison(a, unused, unused)
    got = ops.masked_fp8_gemm(a, b, torch.tensor(counts, dtype=torch.int32), out)
    assert got is out
    for g, count in enumerate(counts):
        rows = Fp8Tensor(a.data[g, :count], a.scale[g, :count], a.block)
        assert_same(got[g, :count], naive(rows, b[g]))
        assert (got[g, count:] == 7).all()


@pytest.mark.parametrize("added", [False, True], ids=["plain", "added"])
@pytest.mark.parametrize("counts", [[130, 0, 50], [0, 0], [128, 256], [1]], ids=str)
def test_k_grouped(counts: list[int], added: bool) -> None:
    ends_G = group_layout.ends_of(torch.tensor(counts))
    K = group_layout.aligned(int(ends_G[-1])) + 128
    a, b = quantize_fp8(normal(20, K)), quantize_fp8(normal(35, K, seed=1))
    padding_K = group_layout.rows_of(ends_G, K) < 0
    for x in (a, b):
        poison(x, padding_K, padding_K.view(-1, 128).all(1))
    c = normal(len(counts), 20, 35) if added else None
    got = ops.k_grouped_fp8_gemm(a, b, ends_G, c)
    assert got.dtype == torch.float32
    for g, (start, stop) in enumerate(group_layout.spans(ends_G)):
        x, y = numbers(a)[:, start:stop], numbers(b)[:, start:stop]
        want = x @ y.t() + (0 if c is None else c[g].double())
        assert_same(got[g], want)
    if c is not None:
        assert torch.equal(ops.k_grouped_fp8_gemm(a, b, ends_G, c, c), got)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


A, B = quantize_fp8(normal(6, 256)), quantize_fp8(normal(5, 256), SQUARES)
STACK = quantize_fp8(normal(2, 5, 256), SQUARES)
BAD = {
    "K": (lambda: ops.fp8_gemm(A, quantize_fp8(normal(5, 384), SQUARES)), "got [6, 256] and [5, 384]"),
    "partial K": (
        lambda: ops.fp8_gemm(quantize_fp8(normal(6, 200)), quantize_fp8(normal(5, 200), SQUARES)),
        "K must be a multiple of 128, the block that shares a scale, got a [6, 200]; fill both operands with zeros up "
        "to 256",
    ),
    "block of a": (lambda: ops.fp8_gemm(B, B), "a must be in blocks (1, 128), got (128, 128)"),
    "block of b": (lambda: ops.fp8_gemm(A, quantize_fp8(normal(5, 256), (1, 64))), "or (1, 128), got (1, 64)"),
    "dtype": (lambda: ops.fp8_gemm(A, B, dtype=torch.float16), "bfloat16 or float32, got torch.float16"),
    "c": (lambda: ops.fp8_gemm(A, B, normal(5, 6), dtype=torch.float32), "c must be torch.float32 [6, 5], got"),
    "out": (lambda: ops.fp8_gemm(A, B, None, normal(6, 5), torch.bfloat16), "out must be torch.bfloat16 [6, 5], got"),
    "scale": (
        lambda: ops.fp8_gemm(Fp8Tensor(A.data, A.scale * NAN, A.block), B),
        "scales of a hold NaN or infinity",
    ),
    "device": (lambda: ops.fp8_gemm(A, B, out_MN=torch.empty(6, 5, device="meta")), "out on meta"),
    "groups": (lambda: ops.grouped_fp8_gemm(A, STACK, int32(0, 0, 0, 0, 0, 2)), "groups in [0, 2)"),
    "alignment": (lambda: ops.grouped_fp8_gemm(A, STACK, int32(0, 0, 0, 1, 1, 1)), "rows 0 to 5 mix groups [0, 1]"),
    "layout": (lambda: ops.grouped_fp8_gemm(A, STACK, torch.zeros(6)), "layout must be int32 [6]"),
    "psum layout": (lambda: ops.grouped_fp8_gemm(A, STACK, int32(0) * 0, psum=True), "must be int32 [2], the ends"),
    "ends": (lambda: ops.grouped_fp8_gemm(A, STACK, int32(7, 128), psum=True), "the last group ends at row 128 of 6"),
    "dims": (lambda: ops.grouped_fp8_gemm(A, B, int32(0, 0, 0, 0, 0, 0)), "want a [M, K] and b [G, N, K]"),
    "stacks": (lambda: ops.masked_fp8_gemm(quantize_fp8(normal(3, 6, 256)), STACK, int32(0, 0)), "3 groups and b 2"),
    "counts": (lambda: ops.masked_fp8_gemm(STACK_A, STACK, int32(2, 7)), "counts must lie in [0, 6], got 2 to 7"),
    "k block": (lambda: ops.k_grouped_fp8_gemm(A, B, int32(256)), "b must be in blocks (1, 128), got (128, 128)"),
    "k alignment": (lambda: ops.k_grouped_fp8_gemm(A, A, int32(256), alignment=64), "multiple of 128, got 64"),
    "k ends": (lambda: ops.k_grouped_fp8_gemm(A, A, int32(130, 200)), "group 1 ends at row 200"),
}  # fmt: skip
STACK_A = quantize_fp8(normal(2, 6, 256))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(name: str) -> None:
    call, told = BAD[name]
    with pytest.raises(ValueError) as error:
        call()
    assert told in str(error.value)
