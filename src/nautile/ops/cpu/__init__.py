"""Twins of the reference for CPUs: explicit backward passes that save little and copy less, and C++ for decoding."""

import torch


def unavailable(device: torch.device) -> str | None:
    """Why nothing here can run on `device`; None if it can."""
    return None if device.type == "cpu" else f"tensors are on {device.type}"
