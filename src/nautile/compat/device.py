"""What official code asks a device, with an answer where there is none."""

import torch

SMS_OF_H100 = 132
"""Multiprocessors to plan for where there is no GPU."""


def multiprocessors(device: torch.device | None = None) -> int:
    """Those of `device`, or of the current CUDA device; an H100's 132 on a CPU."""
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is None or device.type != "cuda":
        return SMS_OF_H100
    return torch.cuda.get_device_properties(device).multi_processor_count
