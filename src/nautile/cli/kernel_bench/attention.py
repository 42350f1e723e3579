"""Attention: decoding over latents, dense and sparse; sparse prefill; the indexer; training with 192/128 heads."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile import ops
from nautile.cli.kernel_bench.cases import Case, Ready, copies, in_turns, nbytes
from nautile.cli.kernel_bench.products import without_gradient
from nautile.ops.latent_bytes import quantize_latents
from nautile.ops.latent_layout import ROWS

X, V, PAGE = 576, 512, 64
"""Dimensions of a latent, how many of them are values, and tokens of a page."""


def cases(small: bool, quick: bool) -> list[Case]:
    """Sizes by what a device can do in a few milliseconds."""
    B, T, K = (1, 8192, 1024) if small else (128, 16384, 2048)
    heads = (16, 128) if small or not quick else (128,)
    found = [Case("paged_mla_decode", f"b{B} h{H} t{T} bf16", lambda d, H=H: dense_decode(d, B, H, T)) for H in heads]
    found.append(Case("paged_sparse_mla_decode", f"b{B} h128 t{T} k{K} fp8", lambda d: sparse_decode(d, B, 128, T, K)))
    sparse = (16, 16, 1024, 512) if small else (4096, 128, 32768, 2048)
    shape = "s{} h{} t{} k{} bf16".format(*sparse)
    found.append(Case("sparse_mla_prefill", shape, lambda d: sparse_prefill(d, *sparse)))
    shape = f"{shape}, forward and backward"
    found.append(Case("sparse_mla_prefill", shape, lambda d: sparse_training(d, *sparse)))
    S, rows = (16, 2048) if small else (2048, 65536)
    found.append(Case("mqa_logits", f"s{S} t{rows} j64 i128 fp8", lambda d: logits(d, S, rows)))
    found.append(Case("top_rows", f"s{S} t{rows} k{rows // 32}", lambda d: top_rows(d, S, rows, rows // 32)))
    B, S, H = (1, 512, 4) if small else (2, 4096, 32)
    found.append(
        Case("causal_attention", f"b{B} s{S} h{H} q192 v128 bf16, forward and backward", lambda d: train(d, B, S, H))
    )
    return found


def dense_decode(device: torch.device, B: int, H: int, T: int) -> Ready:
    """One new token per request over T cached latents."""
    q = torch.randn(B, 1, H, X, device=device).bfloat16()
    pages = T // PAGE
    one = torch.randn(B * pages, PAGE, X, device=device).bfloat16()
    caches = [one.clone() for _ in range(copies(device, nbytes(one)))]
    table = torch.randperm(B * pages, device=device).to(torch.int32).view(B, pages)
    lengths = torch.full((B,), T, dtype=torch.int32, device=device)

    def ours(cache: Tensor) -> object:
        return ops.paged_mla_decode(q, cache, table, lengths, V)

    def products(cache: Tensor) -> object:
        """Two products of all heads at once: SDPA has no kernel for heads this wide, and its fallback expands the
        latents per head, which takes 70 times as long on a CPU and more memory than a GPU has.
        """
        key = cache.view(B, T, X)  # pages in another order, which spares the baseline a copy
        return (q[:, 0] @ key.mT).float().mul(X**-0.5).softmax(-1).bfloat16() @ key[..., :V]

    return Ready(
        run=in_turns([without_gradient(partial(ours, cache)) for cache in caches]),
        example=q,
        flops=2 * B * H * T * (X + V),
        moved=nbytes(one) + B * H * (X + V) * 2,
        factors="bfloat16",
        baseline=in_turns([without_gradient(partial(products, cache)) for cache in caches]),
        baseline_name="torch matmul, softmax",
    )


def sparse_decode(device: torch.device, B: int, H: int, T: int, K: int) -> Ready:
    """One new token per request over K of T latents in FP8."""
    q = torch.randn(B, 1, H, X, device=device).bfloat16()
    cache = quantize_latents(torch.randn(B * T // PAGE, PAGE, X, device=device).bfloat16())
    offsets = torch.arange(B, device=device)[:, None, None] * T
    rows = (torch.rand(B, 1, T, device=device).topk(K, -1).indices + offsets).to(torch.int32)
    return Ready(
        run=without_gradient(lambda: ops.paged_sparse_mla_decode(q, cache, rows)),
        example=q,
        flops=2 * B * H * K * (X + V),
        moved=B * K * ROWS.bytes + B * H * (X + V) * 2,
        factors="bfloat16",
    )


def sparse_prefill(device: torch.device, S: int, H: int, T: int, K: int) -> Ready:
    """Tokens of a prompt, K rows each."""
    q, kv = torch.randn(S, H, X, device=device).bfloat16(), torch.randn(T, X, device=device).bfloat16()
    rows = torch.randint(0, T, (S, K), dtype=torch.int32, device=device)
    return Ready(
        run=without_gradient(lambda: ops.sparse_mla_prefill(q, kv, rows, X**-0.5)),
        example=q,
        flops=2 * S * H * K * (X + V),
        moved=nbytes(q, kv, rows) + S * H * V * 2,
        factors="bfloat16",
    )


def sparse_training(device: torch.device, S: int, H: int, T: int, K: int) -> Ready:
    """The same in training: two products forward, five backward. Every row named is read and gets a gradient."""
    q, kv = (torch.randn(*shape, X, device=device).bfloat16().requires_grad_() for shape in ((S, H), (T,)))
    rows = torch.randint(0, T, (S, K), dtype=torch.int32, device=device)
    upstream = torch.randn(S, H, V, device=device).bfloat16()

    def work() -> None:
        torch.autograd.grad(ops.sparse_mla_prefill(q, kv, rows, X**-0.5)[0], (q, kv), upstream)

    return Ready(
        run=work,
        example=q,
        flops=2 * S * H * K * (X + V + 3 * X + 2 * V),
        moved=2 * nbytes(q, kv, rows, upstream),
        factors="bfloat16",
    )


def logits(device: torch.device, S: int, T: int) -> Ready:
    """The lightning indexer's scores of T keys."""
    q = torch.randn(S, 64, 128, device=device).to(torch.float8_e4m3fn)
    k = torch.randn(T, 128, device=device).to(torch.float8_e4m3fn)
    scale, weights = torch.rand(T, device=device), torch.randn(S, 64, device=device)
    start = torch.zeros(S, dtype=torch.int32, device=device)
    end = torch.full_like(start, T)
    return Ready(
        run=lambda: ops.mqa_logits(q, k, weights, start, end, scale),
        example=q,
        flops=2 * S * T * 64 * 128,
        moved=nbytes(q, k, scale, weights) + 4 * S * T,
        factors="float8_e4m3fn",
    )


def top_rows(device: torch.device, S: int, T: int, K: int) -> Ready:
    """The best of a row of scores, ties in order."""
    scores = torch.randn(1, S, T, device=device)
    seen = torch.ones(1, S, T, dtype=torch.bool, device=device)
    return Ready(
        run=lambda: ops.top_rows(scores, seen, K),
        example=scores,
        flops=S * T,
        moved=nbytes(scores) + 8 * S * K,
        factors="float32",
        baseline=lambda: scores.topk(K, sorted=False),
        baseline_name="torch topk",
    )


def train(device: torch.device, B: int, S: int, H: int) -> Ready:
    """MLA's expanded form in training; two products forward, five backward, half of each masked."""
    q, k = (torch.randn(B, S, H, 192, device=device).bfloat16().requires_grad_() for _ in range(2))
    v = torch.randn(B, S, H, 128, device=device).bfloat16().requires_grad_()
    upstream = torch.randn(B, S, H, 128, device=device).bfloat16()

    def sdpa() -> None:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out.transpose(1, 2), (q, k, v), upstream)

    def ours() -> None:
        torch.autograd.grad(ops.causal_attention(q, k, v, 192**-0.5), (q, k, v), upstream)

    return Ready(
        run=ours,
        example=q,
        flops=B * H * S * S * (192 + 128 + 3 * 192 + 2 * 128),
        moved=2 * nbytes(q, k, v, upstream),
        factors="bfloat16",
        baseline=sdpa,
        baseline_name="torch SDPA",
    )
