"""Products by oneDNN, with an activation or a factor applied while the result is written.

Torch gives float32 products to MKL, which uses 256-bit instructions on processors that are not Intel's even where they
have 512-bit ones; oneDNN asks the processor, not the maker. On a Zen 5 core that is 235 against 110 GFLOP/s. The
entry points are those that torch's own compiler calls for layers on a CPU.
"""

import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FEWEST_ROWS = 16
"""Below, a product is bound by reading the weights, which MKL does as fast with less ado."""


@cache
def takes(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are at least as fast here as torch's own choice. A rule, so that runs repeat."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return dtype == torch.float32 and wide and not _made_by_intel()


def suits(x: Tensor, *weights: Tensor) -> bool:
    """Whether `product` may take these: one dtype that it is good at, enough rows, weights without gaps in memory.

    With gaps, oneDNN falls back to plain loops, a thousand times slower.
    """
    plain = all(weight.dtype == x.dtype and weight.is_contiguous() for weight in weights)
    return plain and takes(x.dtype) and x.numel() >= FEWEST_ROWS * x.shape[-1] > 0


def product(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b. No gradient."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight_OD, bias_O, "none", [], "")


def gated_product(x: Tensor, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """silu(x W_gateᵀ) ⊙ (x W_upᵀ) without a pass over either. No gradient."""
    silu = torch.ops.mkldnn._linear_pointwise.default(x, gate_FD, None, "swish", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, silu, up_FD, None, "mul")


def _made_by_intel() -> bool:
    info = Path("/proc/cpuinfo")
    return sys.platform != "linux" or "GenuineIntel" in info.read_text()
