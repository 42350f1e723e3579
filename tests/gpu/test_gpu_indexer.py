"""The indexer's kernels on a GPU at the shapes of V3.2: against the reference, bit for bit twice, in bounded memory."""

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from nautile import ops
from nautile.ops.index_cache import index_planes
from nautile.ops.numerics import FP8_DIFF, MQA_BF16_DIFF, MQA_DIFF, calc_diff

pytestmark = pytest.mark.gpu
FP8 = torch.float8_e4m3fn
DEVICE = "cuda"
NEEDS_FP8 = pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 9), reason="no FP8 products here")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def quantised(k_TI: Tensor) -> tuple[Tensor, Tensor]:
    scale_T = k_TI.abs().amax(-1).clamp(min=1e-4) / 448
    return (k_TI / scale_T[..., None]).to(FP8), scale_T


@NEEDS_FP8
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("S", "T", "J", "I"), [(257, 1000, 64, 128), (512, 4096, 32, 64), (130, 700, 64, 32)])
def test_windows(S: int, T: int, J: int, I: int, out: torch.dtype) -> None:  # noqa: E741
    q, k, weights = normal(S, J, I), normal(T, I, seed=1), normal(S, J, seed=2)
    k8, scale = quantised(k)
    start = torch.arange(S, device=DEVICE, dtype=torch.int32) % 97
    end = (start + 3 * torch.arange(S, device=DEVICE, dtype=torch.int32)).clamp(max=T)
    arguments = (q.to(FP8), k8, weights, start, end, scale)
    got, again = (ops.mqa_logits(*arguments, dtype=out) for _ in range(2))
    with ops.use("reference"):
        want = ops.mqa_logits(*arguments)
        unrounded = ops.mqa_logits(q, k, weights, start, end)
    hidden = want == float("-inf")
    assert torch.equal(got == float("-inf"), hidden) and torch.equal(got, again)
    assert calc_diff(got.masked_fill(hidden, 0), want.masked_fill(hidden, 0)) < (
        MQA_BF16_DIFF if out == torch.bfloat16 else MQA_DIFF
    )
    assert calc_diff(got.masked_fill(hidden, 0), unrounded.masked_fill(hidden, 0)) < FP8_DIFF
    width = int((end - start).max())
    packed = ops.mqa_logits(*arguments, dtype=out, width=width)
    rows = torch.arange(width, device=DEVICE) + start[:, None]
    there = rows < end[:, None]
    assert torch.equal(packed[there], got.gather(1, rows.clamp(max=T - 1).long())[there])


@NEEDS_FP8
@pytest.mark.parametrize(("B", "N", "J", "page"), [(7, 1, 64, 64), (5, 2, 32, 64), (3, 4, 64, 16)])
def test_pages(B: int, N: int, J: int, page: int) -> None:
    M = 30
    cache = torch.full((B * M, page, 132), 0x7F, dtype=torch.uint8, device=DEVICE)
    keys, scales = index_planes(cache, 128)
    pages = torch.randperm(B * M, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE).view(B, M).int()
    lengths = torch.randint(0, M * page, (B, N), generator=torch.Generator(DEVICE).manual_seed(4), device=DEVICE).int()
    k8, scale = quantised(normal(B * M, page, 128, seed=1))
    keys.copy_(k8)
    scales.copy_(scale)
    for b in range(B):
        pages[b, -(-int(lengths[b].max()) // page) :] = 2147480000
    arguments = (normal(B, N, J, 128).to(FP8), cache, normal(B * N, J, seed=2), lengths, pages, M * page)
    got, again = (ops.paged_mqa_logits(*arguments) for _ in range(2))
    with ops.use("reference"):
        want = ops.paged_mqa_logits(*arguments)
    hidden = want == float("-inf")
    assert torch.equal(got == float("-inf"), hidden) and torch.equal(got, again)
    assert calc_diff(got.masked_fill(hidden, 0), want.masked_fill(hidden, 0)) < MQA_DIFF


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_scores_and_their_gradients(dtype: torch.dtype) -> None:
    inputs = normal(2, 300, 64, 128).to(dtype), normal(2, 500, 128, seed=1).to(dtype), normal(2, 300, 64, seed=2)
    upstream, results = normal(2, 300, 500, seed=3), []
    for backend in ("triton", "triton", "reference"):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with ops.use(backend):
            scores = ops.index_scores(*leaves)
        scores.backward(upstream)
        results.append([scores.detach(), *(x.grad for x in leaves)])
    for once, twice, want in zip(*results, strict=True):
        assert torch.equal(once, twice)
        assert (once.double() - want.double()).norm() <= (0.01 if once.dtype == torch.bfloat16 else 1e-4) * want.norm()


@pytest.mark.parametrize("k", [1, 64, 2048])
def test_selection(k: int) -> None:
    scores = normal(2, 50, 9000)
    scores[:, ::2] = scores[:, ::2].round()  # ties
    seen = torch.arange(9000, device=DEVICE) <= torch.arange(50, device=DEVICE)[:, None] * 180
    picked = []
    for backend in ("triton", "reference"):
        with ops.use(backend):
            picked.append(ops.top_rows(scores, seen.expand(2, 50, 9000), k).sort(-1).values)
    assert torch.equal(*picked)


@pytest.mark.parametrize("which", ["all", "selected"])
def test_the_loss_and_its_gradients(which: str) -> None:
    B, S = 2, 700
    index = normal(B, S, 16, 64).bfloat16(), normal(B, S, 64, seed=1).bfloat16(), normal(B, S, 16, seed=2)
    q, k = normal(B, S, 8, 192, seed=3).bfloat16(), normal(B, S, 8, 192, seed=4).bfloat16()
    selected = None if which == "all" else normal(B, S, S, seed=5) > 0.5
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.detach().clone().requires_grad_() for x in index]
        with ops.use(backend):
            loss = ops.indexer_kl(*leaves, q, k, 0.07, selected)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for got, want in zip(*results, strict=True):
        assert (got.double() - want.double()).norm() <= (0.02 if got.dtype == torch.bfloat16 else 1e-3) * want.norm()


def test_memory_of_the_loss_does_not_follow_heads() -> None:
    B, S, H = 1, 4096, 64
    index = [normal(B, S, 64, 128).bfloat16(), normal(B, S, 128).bfloat16(), normal(B, S, 64)]
    q, k = normal(B, S, H, 192).bfloat16(), normal(B, S, H, 192).bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.indexer_kl(*(x.requires_grad_() for x in index), q, k, 0.07).backward()
    assert torch.cuda.max_memory_allocated() - before < 1 << 30  # H · S · S probabilities in float32 are 4 GiB
