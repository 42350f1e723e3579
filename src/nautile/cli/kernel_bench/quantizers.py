"""Casts to FP8: bound by what they read and write."""

import torch

from nautile import ops
from nautile.cli.kernel_bench.cases import Case, Ready, nbytes


def cases(small: bool, quick: bool) -> list[Case]:
    """Activations in tiles, weights in blocks, SwiGLU fused with its cast."""
    T, D = (512, 2048) if small else (8192, 7168)
    found = [
        Case("quantize_fp8", f"1 x 128, {T} x {D}", lambda d: quantize(d, T, D, (1, 128))),
        Case("quantize_fp8", f"128 x 128, {T} x {D}", lambda d: quantize(d, T, D, (128, 128))),
        Case("swiglu_quantize", f"{T} x {D}", lambda d: swiglu(d, T, D)),
    ]
    return found[:1] + found[2:] if quick else found


def quantize(device: torch.device, T: int, D: int, block: tuple[int, int]) -> Ready:
    """bfloat16 in, FP8 and scales out."""
    x = torch.randn(T, D, device=device).bfloat16()
    one = ops.quantize_fp8(x, block)
    return Ready(
        run=lambda: ops.quantize_fp8(x, block),
        example=x,
        flops=3 * T * D,
        moved=nbytes(x, one.data, one.scale),
        factors="float32",
        baseline=lambda: x.to(torch.float8_e4m3fn),
        baseline_name="torch cast, no scales",
    )


def swiglu(device: torch.device, T: int, F_: int) -> Ready:
    """Gate and up in bfloat16 in, FP8 out."""
    gate_up = torch.randn(T, 2 * F_, device=device).bfloat16()
    one = ops.swiglu_quantize(gate_up)

    def parts() -> object:
        gate, up = gate_up.chunk(2, -1)
        return ops.quantize_fp8(torch.nn.functional.silu(gate) * up)

    return Ready(
        run=lambda: ops.swiglu_quantize(gate_up),
        example=gate_up,
        flops=8 * T * F_,
        moved=nbytes(gate_up, one.data, one.scale),
        factors="float32",
        baseline=parts,
        baseline_name="silu, mul, quantize_fp8",
    )
