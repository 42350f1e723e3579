"""Where to compute, how precisely, and on how many threads. Automatic choices come with their reason."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from nautile.core.errors import UserError
from nautile.layers.block import Block
from nautile.layers.fp8 import in_fp8_
from nautile.models.causal_lm import CausalLM

Asked = Literal["auto", "fp32", "bf16", "fp8"]
Precision = Literal["fp32", "bf16", "fp8"]


def resolve_device(asked: str) -> tuple[torch.device, str]:
    """The device for ``auto``, ``cpu`` or ``cuda``, and why.

    Raises:
        UserError: ``cuda`` where there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.device is cuda, and torch finds no CUDA device",
            f"torch {torch.__version__} was built for {torch.version.cuda or 'CPUs only'}",
            "--train.device cpu, or install a CUDA build of torch on a machine with a GPU",
        )
    if asked != "auto":
        return torch.device(asked), "as asked"
    if torch.cuda.is_available():
        return torch.device("cuda"), "CUDA is available"
    return torch.device("cpu"), "no CUDA here"


def resolve_precision(asked: Asked, device: torch.device) -> tuple[Precision, str]:
    """What is asked for; ``fp32`` or ``bf16`` for ``auto``; and why.

    bf16 means autocast: matmuls in bfloat16, everything else and all master weights, gradients and optimiser state in
    float32. It pays only where bfloat16 products are native; elsewhere they are emulated and slower than float32. fp8
    is bf16 with the products of `nautile.layers.fp8` in FP8. It is never chosen unasked: it changes the numbers.

    Raises:
        UserError: ``fp8`` on a GPU that cannot multiply FP8.
    """
    if asked == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"train.precision is fp8, and {torch.cuda.get_device_name(device)} has no FP8 products",
            "they need compute capability 8.9 or later: Ada, Hopper, Blackwell",
            "--train.precision bf16, or --train.device cpu, which emulates FP8 slowly",
        )
    if asked == "fp8" and device.type == "cpu":
        return asked, "as asked; a CPU emulates FP8 products in float32, slower than bf16"
    if asked != "auto":
        return asked, "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU multiplies bfloat16 natively"
        return "fp32", "this GPU has no native bfloat16"
    capabilities = torch.cpu.get_capabilities()
    native = [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)]
    if native:
        return "bf16", f"this CPU multiplies bfloat16 natively ({native[0]})"
    return "fp32", "this CPU has neither amx_bf16 nor avx512_bf16, so bfloat16 would be emulated"


def resolve_threads(asked: int | None) -> tuple[int, str]:
    """CPU threads for one tensor operation, and why."""
    if asked is not None:
        return asked, "as asked"
    return torch.get_num_threads(), "torch's own choice: one per core, unless OMP_NUM_THREADS says otherwise"


def prepare_model_(model: CausalLM, precision: str) -> None:
    """Give the model the layers of this precision: for fp8 other ones in its blocks, with the same parameters."""
    if precision == "fp8":
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            in_fp8_(block)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which forward passes run."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
