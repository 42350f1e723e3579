"""Triton kernels: one Python source that runs on any CUDA device, and slowly in Triton's interpreter on a CPU."""

import os
from importlib.util import find_spec

import torch


def unavailable(device: torch.device) -> str | None:
    """Why no Triton kernel can run on `device`; None if they can. Imports Triton only where it will be used.

    The interpreter is for tests and for looking into a kernel: it runs only if both ``TRITON_INTERPRET=1`` and the
    backend ``triton`` are asked for.
    """
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type == "cuda":
        return None
    if device.type != "cpu":
        return f"tensors are on {device.type}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "tensors are on cpu"
    from nautile.ops.dispatch import forced_backend

    if forced_backend() != "triton":
        return "tensors are on cpu, and interpreting kernels has to be asked for: NAUTILE_OPS=triton"
    from nautile.ops.triton.interpreter import repair

    repair()
    return None
