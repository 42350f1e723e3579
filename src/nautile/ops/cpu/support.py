"""What the CPU twins accept."""

import torch


def floats_on_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CPU twins cannot take such tensors; None if they can."""
    if device.type != "cpu":
        return f"tensors are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"{dtype} is not one of float32, bfloat16, float64"
    return None
