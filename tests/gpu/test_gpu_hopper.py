"""The Hopper kernels on a Hopper GPU, against the specification at sizes of real models and at odd ones."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops import group_layout
from nautile.ops.dispatch import implementation
from nautile.ops.fp8_products import fp8_gemm, grouped_fp8_gemm, k_grouped_fp8_gemm, masked_fp8_gemm
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.hopper import unavailable
from nautile.ops.numerics import MLA_DENSE_OUT, MLA_LSE, SAME_FP8_DIFF, calc_diff, within
from nautile.ops.reference import fp8_products as reference
from nautile.ops.reference import paged_latents

REASON = unavailable(torch.device("cuda")) if torch.cuda.is_available() else "no CUDA"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
ACCUMULATOR_DIFF = 1e-5
"""Beyond `SAME_FP8_DIFF`, whose sums are float32: the tensor cores keep about 14 bits within each 128 of K."""


def operand(*shape: int, block: tuple[int, int] = (1, 128)) -> Fp8Tensor:
    r, c = block
    data = torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], -(-shape[-2] // r), -(-shape[-1] // c), device="cuda") + 0.5
    return Fp8Tensor(data, scale, block)


def assert_close(got: Tensor, want: Tensor) -> None:
    assert not got.isnan().any()
    assert calc_diff(got, want.to(got.dtype)) < ACCUMULATOR_DIFF + SAME_FP8_DIFF


@pytest.mark.parametrize("M", [1, 17, 64, 128, 333, 4096])
@pytest.mark.parametrize("N, K", [(2112, 7168), (576, 7168), (7168, 2048), (4096, 512), (333, 256)])
def test_dense(M: int, N: int, K: int) -> None:
    a, b = operand(M, K), operand(N, K, block=(128, 128))
    want = reference.fp8_gemm(a, b, None, torch.empty(M, N, device="cuda"))
    with ops.use("hopper"):
        first = fp8_gemm(a, b)
        assert_close(first, want)
        assert all(torch.equal(fp8_gemm(a, b), first) for _ in range(10))


@pytest.mark.parametrize("M, N, K", [(1536, 2048, 4096), (129, 77, 384)])
def test_a_weights_gradient(M: int, N: int, K: int) -> None:
    a, b, c = operand(M, K), operand(N, K), torch.randn(M, N, device="cuda")
    want = reference.fp8_gemm(a, b, c, torch.empty(M, N, device="cuda"))
    with ops.use("hopper"):
        assert_close(fp8_gemm(a, b, c, out_MN=c), want)


@pytest.mark.parametrize("alignment", [16, 64, 128, 256])
def test_groups_of_rows(alignment: int) -> None:
    counts = torch.tensor([500, 0, 1, 128, 77, 3000], dtype=torch.int32, device="cuda")
    ends = group_layout.ends_of(counts, alignment)
    M = group_layout.aligned(int(ends[-1]), 256)
    a, b = operand(M, 2048), operand(6, 1536, 2048, block=(128, 128))
    layout = group_layout.rows_of(ends, M, alignment)
    a.data.view(torch.uint8)[layout < 0] = 0x7F
    want = reference.grouped_fp8_gemm(a, b, layout, torch.empty(M, 1536, device="cuda"), alignment)
    with ops.use("hopper"):
        assert_close(grouped_fp8_gemm(a, b, layout, alignment=alignment), want)
        assert_close(grouped_fp8_gemm(a, b, ends, psum=True, alignment=alignment), want)


@pytest.mark.parametrize("M", [16, 192, 1024])
def test_masked_rows(M: int) -> None:
    counts = torch.randint(0, M + 1, (9,), dtype=torch.int32, device="cuda")
    counts[3] = 0
    a, b = operand(9, M, 2048), operand(9, 1536, 2048, block=(128, 128))
    out = torch.full((9, M, 1536), 7.0, dtype=torch.bfloat16, device="cuda")
    want = reference.masked_fp8_gemm(a, b, counts, out.float())
    with ops.use("hopper"):
        assert_close(masked_fp8_gemm(a, b, counts, out), want)
    unused = torch.arange(M, device="cuda") >= counts[:, None]
    assert (out[unused] == 7).all()


def test_groups_of_k() -> None:
    counts = torch.tensor([300, 0, 1, 128, 4000], dtype=torch.int32, device="cuda")
    ends = group_layout.ends_of(counts, 128)
    K = group_layout.aligned(int(ends[-1]), 128)
    a, b, c = operand(1536, K), operand(2048, K), torch.randn(5, 1536, 2048, device="cuda")
    unused = group_layout.rows_of(ends, K, 128) < 0
    for x in (a, b):
        x.data.view(torch.uint8)[:, unused] = 0x7F
    want = reference.k_grouped_fp8_gemm(a, b, ends, c, torch.empty_like(c), 128)
    with ops.use("hopper"):
        assert_close(k_grouped_fp8_gemm(a, b, ends, c, out_GMN=c), want)


def test_in_a_cuda_graph() -> None:
    a, b = operand(64, 2048), operand(1536, 2048, block=(128, 128))
    with ops.use("hopper"):
        want = fp8_gemm(a, b)
        out, graph = torch.empty_like(want), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fp8_gemm(a, b, out_MN=out)
        graph.replay()
    assert torch.equal(out, want)


@pytest.mark.parametrize("S, H, causal", [(1, 16, False), (1, 128, False), (2, 128, True), (4, 63, True), (3, 1, True)])
@pytest.mark.parametrize("P", [64, 256])
def test_dense_decoding(S: int, H: int, causal: bool, P: int) -> None:
    lengths = torch.tensor([4096, 0, 1, 140, 20_000, 64], dtype=torch.int32)
    B, W = len(lengths), -(-int(lengths.max()) // P)
    q = (torch.randn(B, S, H, 576, device="cuda") / 10).clamp(-1, 1).bfloat16()
    cache = torch.full((B * W, P, 576), float("nan"), device="cuda", dtype=torch.bfloat16)
    pages = torch.randperm(B * W).view(B, W)
    table = torch.full((B, W), 2_147_480_000, dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        for w in range(-(-length // P)):
            rows = min(P, length - w * P)
            table[b, w] = pages[b, w]
            cache[pages[b, w], :rows] = (torch.randn(rows, 576, device="cuda") / 10).clamp(-1, 1).bfloat16()
    table, lengths = table.cuda(), lengths.cuda()
    want = paged_latents.paged_mla_decode(q, cache.unsqueeze(2), table, lengths, 512, 576**-0.5, causal, None)
    # Only this op has to run here: a schedule may come from any backend.
    with ops.use("hopper"):
        kernel = implementation("paged_mla_decode", q)
    o, lse = kernel(q, cache.unsqueeze(2), table, lengths, 512, 576**-0.5, causal, None)
    assert within(o, want[0], MLA_DENSE_OUT) is None
    assert within(lse, want[1], MLA_LSE) is None
