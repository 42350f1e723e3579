"""Products: with weights as they come, packed, and in FP8; dense."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile import ops
from nautile.cli.kernel_bench.cases import Case, Ready, copies, in_turns, nbytes
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.packed_weight import Kind, pack_weight

DECODE = ((7168, 2112), (2048, 10944))
"""(inputs, outputs) of projections while decoding: V3's query and latent, V2-Lite's dense feed-forward."""
OFFICIAL = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
"""(N, K) of DeepGEMM's dense tests."""
SMALL = ((576, 1024), (1024, 512))
KINDS: tuple[Kind, ...] = ("bf16", "int8", "int4")


def cases(small: bool, quick: bool) -> list[Case]:
    """Decoding products on a CPU; FP8 on both."""
    found = []
    if small:
        for shape in DECODE[:1] if quick else DECODE:
            for m in (1, 8) if quick else (1, 2, 8, 32):
                found.append(Case("linear", _name(m, *shape, "bf16"), partial(plain, m, *shape)))
            for m in (1,) if quick else (1, 8):
                for kind in KINDS:
                    found.append(Case("packed_linear", _name(m, *shape, kind), partial(packed, m, *shape, kind)))
        found.append(Case("rms_norm", "1 x 7168 bf16", lambda device: norm(device, 1, 7168)))
    rows = (128,) if small else ((128, 4096) if quick else (1, 128, 4096))
    shapes = SMALL if small else OFFICIAL
    for N, K in shapes[:1] if quick and small else shapes:
        for M in rows:
            name = f"m{M} n{N} k{K}"
            found.append(Case("fp8_gemm", name, lambda device, M=M, N=N, K=K: fp8_dense(device, M, N, K)))
    return found


def plain(m: int, inputs: int, outputs: int, device: torch.device) -> Ready:
    """A projection of a few tokens, bfloat16, no gradient."""
    x, weights = _decoding(m, inputs, outputs, device)
    return Ready(
        run=in_turns([without_gradient(partial(ops.linear, x, weight)) for weight in weights]),
        example=x,
        flops=2 * m * inputs * outputs,
        moved=nbytes(x, weights[0]) + 2 * m * outputs,
        factors="bfloat16",
        baseline=in_turns([without_gradient(partial(F.linear, x, weight)) for weight in weights]),
        baseline_name="torch linear bf16",
    )


def packed(m: int, inputs: int, outputs: int, kind: Kind, device: torch.device) -> Ready:
    """The same with packed weights; the baseline keeps bfloat16 rows."""
    x, weights = _decoding(m, inputs, outputs, device)
    size = pack_weight(weights[0], kind).nbytes
    ready = [pack_weight(weights[i % len(weights)], kind) for i in range(copies(device, size))]
    return Ready(
        run=in_turns([without_gradient(partial(ops.packed_linear, x, weight)) for weight in ready]),
        example=x,
        flops=2 * m * inputs * outputs,
        moved=nbytes(x) + ready[0].nbytes + 2 * m * outputs,
        factors="bfloat16",
        baseline=in_turns([without_gradient(partial(F.linear, x, weight)) for weight in weights]),
        baseline_name="torch linear bf16",
    )


def _decoding(m: int, inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(m, inputs).bfloat16()
    count = copies(device, 2 * inputs * outputs)
    return x, [torch.randn(outputs, inputs).bfloat16() for _ in range(count)]


def _name(m: int, inputs: int, outputs: int, kind: str) -> str:
    return f"m{m} d{inputs} o{outputs} {kind}"


def norm(device: torch.device, T: int, D: int) -> Ready:
    """The norm of a token."""
    x, weight = torch.randn(T, D, device=device).bfloat16(), torch.randn(D, device=device).bfloat16()
    return Ready(
        run=without_gradient(lambda: ops.rms_norm(x, weight, 1e-6)),
        example=x,
        flops=4 * T * D,
        moved=2 * nbytes(x) + nbytes(weight),
        factors="float32",
        baseline=without_gradient(lambda: F.rms_norm(x, (D,), weight, 1e-6)),
        baseline_name="torch rms_norm",
    )


def fp8_dense(device: torch.device, M: int, N: int, K: int) -> Ready:
    """A product of tiles of 1×128 and blocks of 128×128."""
    a, b = (torch.randn(rows, K, device=device).bfloat16() for rows in (M, N))
    left, right = ops.quantize_fp8(a), ops.quantize_fp8(b, (128, 128))
    out = torch.empty(M, N, dtype=torch.bfloat16, device=device)
    baseline = (lambda: F.linear(a, b)) if device.type == "cpu" else scaled_mm(left, right)
    return Ready(
        run=lambda: ops.fp8_gemm(left, right, out_MN=out),
        example=left.data,
        flops=2 * M * N * K,
        moved=nbytes(left.data, left.scale, right.data, right.scale, out),
        factors="float8_e4m3fn",
        baseline=baseline,
        baseline_name="torch linear bf16" if device.type == "cpu" else "scaled_mm blockwise",
    )


def scaled_mm(left: Fp8Tensor, right: Fp8Tensor):
    """cuBLASLt's product with the same scales, which it wants with their rows contiguous."""
    kinds = F.ScalingType
    a_scale, b_scale = (x.scale.t().contiguous().t() for x in (left, right))

    def run() -> Tensor:
        return F.scaled_mm(
            left.data,
            right.data.t(),
            scale_a=a_scale,
            scale_recipe_a=kinds.BlockWise1x128,
            scale_b=b_scale.t(),
            scale_recipe_b=kinds.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )

    return run


def without_gradient(work):
    """`work` as an engine calls it."""
    return torch.inference_mode()(work)
