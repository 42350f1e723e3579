"""SwiGLU that keeps FP8: exact forward, gradients within the bar, a byte per number kept."""

import pytest
import torch

from nautile import ops
from nautile.ops import quantize_fp8
from nautile.ops.fp8_swiglu import fp8_swiglu
from nautile.ops.numerics import FP8_DIFF, calc_diff


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    both = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype).requires_grad_()
    gate, up = both.chunk(2, -1)
    return gate, up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", [(3, 41, 200), (1, 1), (0, 64), (70, 256), (5,)], ids=str)
def test_gradients_are_those_at_the_rounded_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = inputs(*shape, dtype=dtype)
    y = fp8_swiglu(gate, up)
    torch.testing.assert_close(y, ops.swiglu(gate, up))
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    got = torch.autograd.grad(y, (gate, up), dy, retain_graph=True)
    kept = [rounded(x) for x in (gate, up)]
    for a, b in zip(got, torch.autograd.grad(ops.swiglu(*kept), kept, dy.float()), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype), rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    if y.numel() > 1000:
        for a, b in zip(got, torch.autograd.grad(ops.swiglu(gate, up), (gate, up), dy), strict=True):
            assert calc_diff(a, b) < FP8_DIFF


def rounded(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return quantize_fp8(rows, ue8m0=True).dequantize().view(x.shape).requires_grad_()


def test_a_byte_per_number_is_kept() -> None:
    gate, up = inputs(64, 256, dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_swiglu(gate, up)
    assert sum(t.nbytes for t in kept) == 2 * (64 * 256 + 64 * 2 * 4)


def test_compiled() -> None:
    torch._dynamo.reset()
    gate, up = inputs(4, 32)
    compiled = torch.compile(fp8_swiglu, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(gate, up), ops.swiglu(gate, up))


@pytest.mark.parametrize(
    ("gate", "up", "told"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), "must agree"),
        (torch.ones(2, 3), torch.ones(2, 3).bfloat16(), "must agree"),
        (torch.ones(2, 3).double(), torch.ones(2, 3).double(), "bfloat16 or float32, got torch.float64"),
    ],
)
def test_bad_input_is_told(gate, up, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        fp8_swiglu(gate, up)
