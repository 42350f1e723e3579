"""Experts: a token's few of many, a training step of a layer, and grouped products in FP8."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile import ops
from nautile.cli.kernel_bench.cases import Case, Ready, in_turns, nbytes
from nautile.cli.kernel_bench.products import without_gradient
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.group_layout import aligned

CONTIGUOUS = ((4, 8192), (8, 4096))
"""(groups, rows of each) of DeepGEMM's tests; K and N beside them."""
MASKED = ((32, 192), (6, 1024), (32, 20))
PRODUCTS = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))


def cases(small: bool, quick: bool) -> list[Case]:
    """Decoding and training of a mixture on a CPU; grouped products of FP8 on both."""
    if small:
        return [
            Case("grouped_swiglu", "decode t1 k6 e64 d2048 f1408 bf16", lambda d: decode(d, 1, 6, 64, 2048, 1408)),
            Case("grouped_swiglu", "train t1024 k6 e64 d512 f256 bf16", lambda d: train(d, 1024, 6, 64, 512, 256)),
            Case("grouped_fp8_gemm", "g4 m64 n256 k256", lambda d: contiguous(d, 4, 64, 256, 256)),
        ]
    found = []
    for G, M in CONTIGUOUS[:1] if quick else CONTIGUOUS:
        for N, K in PRODUCTS[:2] if quick else PRODUCTS:
            name = f"g{G} m{M} n{N} k{K}"
            found.append(Case("grouped_fp8_gemm", name, lambda d, G=G, M=M, N=N, K=K: contiguous(d, G, M, N, K)))
    for G, M in MASKED[:1] if quick else MASKED:
        for N, K in PRODUCTS[:2] if quick else PRODUCTS:
            name = f"g{G} m{M} of 4096 n{N} k{K}"
            found.append(Case("masked_fp8_gemm", name, lambda d, G=G, M=M, N=N, K=K: masked(d, G, M, 4096, N, K)))
    return found


def decode(device: torch.device, T: int, K: int, E: int, D: int, F_: int) -> Ready:
    """T tokens of K experts each, all different ones; bytes are those of the chosen experts alone."""
    x, gate_up, down, _, weights = _layer(device, T, K, E, D, F_)
    one_expert = nbytes(gate_up[0], down[0])
    draws = [torch.stack([torch.randperm(E)[:K] for _ in range(T)]).to(device) for _ in range(8)]
    visited = sum(len(chosen.unique()) for chosen in draws) / len(draws)

    def ours(chosen: Tensor) -> Tensor:
        return ops.grouped_swiglu(x, gate_up, down, chosen, weights)

    def loop(chosen: Tensor) -> Tensor:
        y = torch.zeros(T, D, dtype=torch.float32, device=device)
        for t, k in ((t, k) for t in range(T) for k in range(K)):
            gate, up = F.linear(x[t], gate_up[chosen[t, k]]).chunk(2)
            y[t] += weights[t, k] * F.linear(F.silu(gate) * up, down[chosen[t, k]])
        return y

    return Ready(
        run=in_turns([without_gradient(partial(ours, chosen)) for chosen in draws]),
        example=x,
        flops=2 * T * K * 3 * D * F_,
        moved=visited * one_expert + 2 * nbytes(x),
        factors="bfloat16",
        baseline=in_turns([without_gradient(partial(loop, chosen)) for chosen in draws]),
        baseline_name="torch linear, a loop",
    )


def train(device: torch.device, T: int, K: int, E: int, D: int, F_: int) -> Ready:
    """Forward and backward of a layer; three products forward, six backward."""
    tensors = _layer(device, T, K, E, D, F_)
    x, gate_up, down, chosen, weights = tensors
    for leaf in (x, gate_up, down, weights):
        leaf.requires_grad_()
    upstream = torch.randn(T, D, device=device).bfloat16()

    def step(layer) -> None:
        for leaf in (x, gate_up, down, weights):
            leaf.grad = None
        layer().backward(upstream)

    return Ready(
        run=lambda: step(lambda: ops.grouped_swiglu(x, gate_up, down, chosen, weights)),
        example=x,
        flops=3 * 2 * T * K * 3 * D * F_,
        moved=3 * nbytes(gate_up, down),
        factors="bfloat16",
        baseline=lambda: step(lambda: by_grouped_mm(x, gate_up, down, chosen, weights)),
        baseline_name="torch _grouped_mm",
    )


def by_grouped_mm(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, chosen_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """The layer as torch's own parts make it: sort, grouped product, SwiGLU, grouped product, weighted sum."""
    E, K = len(down_EDF), chosen_TK.shape[1]
    order_X = chosen_TK.flatten().argsort(stable=True)
    ends_E = torch.bincount(chosen_TK.flatten(), minlength=E).cumsum(0).to(torch.int32)
    token_X = order_X // K
    gate, up = torch._grouped_mm(x_TD[token_X], gate_up_E2FD.mT, offs=ends_E).chunk(2, -1)
    out_XD = torch._grouped_mm(F.silu(gate) * up, down_EDF.mT, offs=ends_E)
    out_XD = out_XD.float() * weights_TK.flatten()[order_X, None].float()
    return torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, token_X, out_XD).to(x_TD.dtype)


def contiguous(device: torch.device, G: int, M: int, N: int, K: int) -> Ready:
    """M rows of each of G groups, times its own matrix; the baseline's rows follow without padding."""
    rows = aligned(M)
    a, b = torch.randn(G * rows, K, device=device).bfloat16(), torch.randn(G, N, K, device=device).bfloat16()
    left, right = ops.quantize_fp8(a), ops.quantize_fp8(b, (128, 128))
    place = torch.arange(G * rows, device=device, dtype=torch.int32)
    layout = torch.where(place % rows < M, place // rows, -1).to(torch.int32)
    out = torch.empty(G * rows, N, dtype=torch.bfloat16, device=device)
    used = layout >= 0
    real, ends = a[used], torch.arange(1, G + 1, dtype=torch.int32, device=device) * M
    return Ready(
        run=lambda: ops.grouped_fp8_gemm(left, right, layout, out),
        example=left.data,
        flops=2 * G * M * N * K,
        moved=_fp8_bytes(Fp8Tensor(left.data[: G * M], left.scale[: G * M], left.block), right) + nbytes(out),
        factors="float8_e4m3fn",
        baseline=lambda: torch._grouped_mm(real, b.mT, offs=ends),
        baseline_name="torch _grouped_mm bf16",
    )


def masked(device: torch.device, G: int, M: int, most: int, N: int, K: int) -> Ready:
    """The first M of `most` rows of each group."""
    a, b = torch.randn(G, most, K, device=device).bfloat16(), torch.randn(G, N, K, device=device).bfloat16()
    left, right = ops.quantize_fp8(a), ops.quantize_fp8(b, (128, 128))
    counts = torch.full((G,), M, dtype=torch.int32, device=device)
    out = torch.empty(G, most, N, dtype=torch.bfloat16, device=device)
    used = Fp8Tensor(left.data[:, :M], left.scale[:, :M], left.block)
    return Ready(
        run=lambda: ops.masked_fp8_gemm(left, right, counts, out),
        example=left.data,
        flops=2 * G * M * N * K,
        moved=_fp8_bytes(used, right) + 2 * G * M * N,
        factors="float8_e4m3fn",
        baseline=lambda: torch.bmm(a[:, :M], b.mT),
        baseline_name="torch bmm bf16",
    )


def _layer(device: torch.device, T: int, K: int, E: int, D: int, F_: int) -> tuple[Tensor, ...]:
    x = torch.randn(T, D, device=device).bfloat16()
    gate_up = (torch.randn(E, 2 * F_, D, device=device) / D**0.5).bfloat16()
    down = (torch.randn(E, D, F_, device=device) / F_**0.5).bfloat16()
    chosen = torch.rand(T, E, device=device).topk(K, dim=-1).indices
    weights = torch.rand(T, K, device=device).bfloat16()
    return x, gate_up, down, chosen, weights


def _fp8_bytes(*tensors: Fp8Tensor) -> int:
    return sum(nbytes(x.data, x.scale) for x in tensors)
