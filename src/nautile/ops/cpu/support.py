"""What the CPU twins accept, and whether they have to keep anything for a backward."""

import torch
from torch import Tensor


def floats_on_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CPU twins cannot take such tensors; None if they can."""
    if device.type != "cpu":
        return f"tensors are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"{dtype} is not one of float32, bfloat16, float64"
    return None


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd will ask for a backward through an op of these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
