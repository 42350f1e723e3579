"""Paged decoding compiled, on a GPU, against the specification: FlashMLA's shapes, adversarial caches, same bits."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops.latent_layout import PLANES, ROWS, LatentLayout
from nautile.ops.numerics import MLA_DENSE_OUT, MLA_LSE, MLA_SPARSE_DECODE_OUT, within

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def on_the_gpu():
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


def agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], bar) -> None:
    assert within(got[0], want[0], bar) is None
    assert within(got[1], want[1], MLA_LSE) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("width", [576, 512])
@pytest.mark.parametrize(
    ("B", "S", "H", "G", "T", "page", "causal"),
    [
        (1, 1, 128, 1, 20, 64, False), (6, 2, 128, 1, 4096, 64, True), (64, 4, 63, 3, 140, 64, True),
        (2, 4, 9, 9, 140, 64, False), (3, 2, 16, 1, 8000, 61, True), (130, 1, 64, 1, 1000, 128, False),
    ],
)  # fmt: skip
def test_dense(B: int, S: int, H: int, G: int, T: int, page: int, causal: bool, width: int, dtype: torch.dtype) -> None:
    lengths = torch.randint(0, T + 1, (B,), dtype=torch.int32)
    lengths[0], lengths[-1] = T, T if B == 1 else 0
    W = -(-T // page) + 1
    table = torch.randperm(B * W).int().view(B, W)
    cache = (torch.randn(B * W, page, G, width) / 10).clamp(-1, 1).to(dtype)
    rows = torch.arange(W * page).view(W, page)
    for b, length in enumerate(lengths.tolist()):
        cache[table[b].long()] = cache[table[b].long()].masked_fill((rows >= length)[:, :, None, None], NAN)
        table[b, -(-length // page) :] = 2147480000
    q = (torch.randn(B, H, S, width) / 10).clamp(-1, 1).to(dtype).transpose(1, 2)
    case = q, cache, table, lengths, 512
    got, again, want = (run(b, ops.paged_mla_decode, *case, causal=causal) for b in ("triton", "triton", "reference"))
    agree(got, want, MLA_DENSE_OUT)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def run(backend: str, op, *arguments, **options) -> tuple[Tensor, Tensor]:
    with ops.use(backend):
        return op(*arguments, **options)


def scope(layout: LatentLayout, B: int, S: int, T: int, K: int, page: int, counted: bool) -> tuple:
    N = -(-B * T // page)
    rows = torch.randint(0, N * page, (B, S, K), dtype=torch.int32)
    for none in (-1, -2147483648, 2147483647, N * page):
        rows[torch.rand(B, S, K) < 0.03] = none
    lengths = torch.randint(0, K + 1, (B,), dtype=torch.int32) if counted else None
    used = rows if lengths is None else rows.masked_fill(torch.arange(K) >= lengths[:, None, None], -1)
    unused = torch.ones(N * page, dtype=torch.bool)
    unused[used[(used >= 0) & (used < N * page)].long()] = False
    latents = (torch.randn(N * page, layout.width) / 10).clamp(-1, 1).bfloat16()
    latents[unused] = NAN
    caches = [run(backend, ops.quantize_latents, latents.view(N, page, -1)) for backend in ("triton", "reference")]
    if not layout.planes:  # the others have bytes that nobody writes
        assert torch.equal(*caches)
    return caches[0], rows, lengths


@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize(
    ("layout", "B", "S", "H", "T", "K", "page", "counted", "extra"),
    [
        (ROWS, 4, 1, 64, 512, 64, 2, False, None), (ROWS, 74, 3, 128, 1024, 576, 61, False, None),
        (ROWS, 2, 2, 128, 4000, 2048, 64, False, None), (ROWS, 3, 1, 5, 700, 300, 69, True, None),
        (PLANES, 4, 3, 64, 512, 64, 69, False, (1024, 576, 61, True)),
        (PLANES, 74, 1, 128, 1024, 576, 2, True, (512, 64, 64, False)),
        (PLANES, 2, 2, 64, 4000, 2048, 576, True, None),
    ],
)  # fmt: skip
def test_sparse(layout: LatentLayout, B, S, H, T, K, page, counted, extra, sunk: bool) -> None:
    cache, rows, lengths = scope(layout, B, S, T, K, page, counted)
    options = {"lengths_B": lengths}
    if extra is not None:
        more = scope(layout, B, S, *extra)
        options |= dict(zip(("extra_cache_NPZ", "extra_rows_BSK", "extra_lengths_B"), more, strict=True))
    if sunk:
        sink = torch.randn(H)
        sink[torch.randn(H) > 0.5], sink[torch.randn(H) < -0.5] = INF, -INF
        options["sink_H"] = sink
    q = torch.randn(B, H, S, layout.width).clamp(-1, 1).bfloat16().transpose(1, 2)
    case = q, cache, rows, layout.width**-0.55
    op = ops.paged_sparse_mla_decode
    got, again, want = (run(b, op, *case, **options) for b in ("triton", "triton", "reference"))
    agree(got, want, MLA_SPARSE_DECODE_OUT)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_plans() -> None:
    for B, parts in ((1, 132), (7, 3), (300, 66), (4096, 132)):
        lengths = torch.randint(0, 9000, (B,), dtype=torch.int32)
        lengths[:: max(2, B // 3)] = 0
        got, want = (run(backend, ops.plan_splits, lengths, parts) for backend in ("triton", "reference"))
        assert torch.equal(got.table_R3, want.table_R3) and torch.equal(got.ends_B, want.ends_B)
