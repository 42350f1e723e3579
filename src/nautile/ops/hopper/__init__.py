"""CUDA C++ for one architecture, sm_90a: its tensor copies (TMA) and warpgroup products (wgmma)."""

from functools import cache

import torch

from nautile.core.jit import why_no_nvcc


def unavailable(device: torch.device) -> str | None:
    """Why no Hopper kernel can run on `device`; None if they can."""
    if device.type != "cuda":
        return f"tensors are on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"needs compute capability 9.0, this device has {major}.{minor}"
    return why_no_nvcc()


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks of a persistent kernel run side by side."""
    return torch.cuda.get_device_properties(device).multi_processor_count
