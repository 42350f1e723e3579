"""Checks of values, which cost a pass over the data and on a GPU a wait for it."""

import os

import torch
from torch import Tensor


def looks_at_values(x: Tensor) -> bool:
    """Whether an op should look at the values of `x`: on a CPU always, elsewhere with ``NAUTILE_DEBUG=1``.

    Never under torch.compile, whose graph would break there.
    """
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    return x.device.type == "cpu" or os.environ.get("NAUTILE_DEBUG") == "1"


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise `ValueError` if the named tensors are on different devices.

    Raises:
        ValueError: Naming each tensor and its device.
    """
    places = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(places.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {listed}")
