"""The specification of every op: plain torch, written for reading, differentiated by autograd, on any device."""

import torch


def unavailable(device: torch.device) -> str | None:
    """Plain torch runs everywhere."""
    return None
