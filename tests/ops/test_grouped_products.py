"""Grouped products: every backend against products of the rows of each group in float64."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops import group_layout
from nautile.ops.dispatch import TABLE
from nautile.ops.numerics import BF16_DIFF, calc_diff

BACKENDS = TABLE["grouped_gemm"][1]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BARS = {torch.float64: 1e-14, torch.float32: 1e-10, torch.bfloat16: BF16_DIFF}
NAN = float("nan")


@pytest.fixture(
    params=[(b, d) for b in BACKENDS for d in DTYPES], autouse=True, ids=lambda p: f"{p[0]}-{str(p[1])[6:]}"
)
def dtype(request):
    backend, dtype = request.param
    if backend == "triton":
        pytest.importorskip("triton")
        if dtype == torch.float64:
            pytest.skip("Triton's kernels accumulate in float32")
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    with ops.use(backend):
        yield dtype
    torch.use_deterministic_algorithms(False)


def normal(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert calc_diff(got, want) < BARS[got.dtype]


GROUPS = [[5, 0, 20, 16], [0, 0, 3], [0, 0], [33, 0, 0], [16]]


@pytest.mark.parametrize("psum", [False, True], ids=["rows", "psum"])
@pytest.mark.parametrize("counts", GROUPS, ids=str)
def test_grouped(counts: list[int], psum: bool, dtype: torch.dtype) -> None:
    G, N, K = len(counts), 40, 83
    ends_G = group_layout.ends_of(torch.tensor(counts), 16)
    M = group_layout.aligned(int(ends_G[-1]), 16) + 16
    groups_M = group_layout.rows_of(ends_G, M, 16)
    a, b = normal(dtype, M, K), normal(dtype, G, K, N).mT  # columns of B lie apart
    a[groups_M < 0] = NAN
    layout = ends_G if psum else groups_M
    got = ops.grouped_gemm(a, b, layout, psum=psum, alignment=16)
    every = torch.einsum("mk,gnk->gmn", a.double(), b.double())
    want = every[groups_M.clamp(min=0).long(), torch.arange(M)].masked_fill(groups_M[:, None] < 0, 0)
    assert got.dtype == dtype
    assert_close(got, want)
    assert (got[groups_M < 0] == 0).all()
    if dtype == torch.bfloat16:
        assert_close(ops.grouped_gemm(a, b, layout, torch.empty(M, N), psum=psum, alignment=16), want)


@pytest.mark.parametrize("counts", [[5, 0, 20, 16], [0, 0, 3], [40]], ids=str)
def test_by_torch(counts: list[int], dtype: torch.dtype) -> None:
    """What a GPU runs where torch takes the layout; padding is multiplied there and must not be seen."""
    if dtype != torch.bfloat16:
        pytest.skip("torch's grouped product is for bfloat16")
    from nautile.ops.triton.grouped_products import by_torch, torch_takes

    ends_G = group_layout.ends_of(torch.tensor(counts), 16)
    M = group_layout.aligned(int(ends_G[-1]), 16) + 16
    groups_M = group_layout.rows_of(ends_G, M, 16)
    a, b, out = normal(dtype, M, 64), normal(dtype, len(counts), 40, 64), torch.empty(M, 40, dtype=dtype)
    a[groups_M < 0] = NAN
    assert torch_takes(a, b, out)
    assert not torch_takes(a[:, 1:], b[..., 1:], out) and not torch_takes(a, b, out.float())
    assert not torch_takes(a, b.mT.contiguous().mT, out)
    with ops.use("reference"):
        want = ops.grouped_gemm(a, b, ends_G, psum=True, alignment=16)
    assert_close(by_torch(a, b, groups_M, ends_G, out, 16), want)
    assert (out[groups_M < 0] == 0).all()


@pytest.mark.parametrize("counts", [[5, 0, 21], [0, 0, 0], [21, 1, 20]], ids=str)
def test_masked(counts: list[int], dtype: torch.dtype) -> None:
    a, b = normal(dtype, 3, 21, 70), normal(dtype, 3, 40, 70, seed=1)
    out = torch.full((3, 21, 40), 7.0, dtype=dtype)
    for g, count in enumerate(counts):
        a[g, count:] = NAN
    assert ops.masked_gemm(a, b, torch.tensor(counts, dtype=torch.int32), out) is out
    for g, count in enumerate(counts):
        assert_close(out[g, :count], a[g, :count].double() @ b[g].double().t())
        assert (out[g, count:] == 7).all()


@pytest.mark.parametrize("added", [False, True], ids=["plain", "added"])
@pytest.mark.parametrize("counts", [[130, 0, 50], [0, 0], [1]], ids=str)
def test_k_grouped(counts: list[int], added: bool, dtype: torch.dtype) -> None:
    ends_G = group_layout.ends_of(torch.tensor(counts), 16)
    K = int(ends_G[-1]) + 5
    a, b = normal(dtype, K, 20), normal(dtype, K, 35, seed=1)
    padding_K = group_layout.rows_of(ends_G, K, 16) < 0
    a[padding_K], b[padding_K] = NAN, NAN
    wide = torch.promote_types(dtype, torch.float32)
    c = normal(wide, len(counts), 20, 35) if added else None
    got = ops.k_grouped_gemm(a, b, ends_G, c, alignment=16)
    assert got.dtype == wide
    for g, (start, stop) in enumerate(group_layout.spans(ends_G, 16)):
        want = a[start:stop].double().t() @ b[start:stop].double()
        assert_close(got[g], want + (0 if c is None else c[g].double()))
    if c is not None:
        assert torch.equal(ops.k_grouped_gemm(a, b, ends_G, c, c, alignment=16), got)
    elif dtype == torch.bfloat16:
        narrow = ops.k_grouped_gemm(a, b, ends_G, None, torch.empty(got.shape, dtype=dtype), alignment=16)
        assert_close(narrow, got)


X, W, ROWS = torch.randn(6, 8), torch.randn(2, 5, 8), torch.zeros(6, dtype=torch.int32)
BAD = {
    "dims": (lambda: ops.grouped_gemm(X, X, ROWS), "want a [M, K] and b [G, N, K], got [6, 8] and [6, 8]"),
    "dtypes": (lambda: ops.grouped_gemm(X, W.bfloat16(), ROWS), "got torch.float32 and torch.bfloat16"),
    "K": (lambda: ops.grouped_gemm(X[:, 1:], W, ROWS), "K of a [6, 7] is not that of b [2, 5, 8]"),
    "groups": (lambda: ops.grouped_gemm(X, W, ROWS + 2), "groups in [0, 2)"),
    "out": (lambda: ops.grouped_gemm(X, W, ROWS, torch.empty(6, 6)), "out must be torch.float32 [6, 5], got"),
    "stacks": (lambda: ops.masked_gemm(W[:1], W, ROWS[:2]), "G or K of a [1, 5, 8] is not that of b [2, 5, 8]"),
    "counts": (lambda: ops.masked_gemm(W, W, ROWS[:2] + 6), "counts must lie in [0, 5], got 6 to 6"),
    "ends": (lambda: ops.k_grouped_gemm(X, X, ROWS[:1] + 7), "the last group ends at row 7 of 6"),
    "c": (lambda: ops.k_grouped_gemm(X, X, ROWS[:1], torch.empty(1, 8, 7)), "c must be torch.float32 [1, 8, 8], got"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(name: str, dtype: torch.dtype) -> None:
    call, told = BAD[name]
    with pytest.raises(ValueError) as error:
        call()
    assert told in str(error.value)


def test_no_backend_makes_a_graph(dtype: torch.dtype) -> None:
    a, b = (x.requires_grad_() for x in (normal(dtype, 16, 8), normal(dtype, 1, 8, 8)))
    layout, counts, ends = (torch.tensor(x, dtype=torch.int32) for x in ([0] * 16, [16], [16]))
    assert not ops.grouped_gemm(a, b, layout, alignment=16).requires_grad
    assert not ops.masked_gemm(a[None], b, counts).requires_grad
    assert not ops.k_grouped_gemm(a, a, ends, alignment=16).requires_grad
