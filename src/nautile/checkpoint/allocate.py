"""A model's memory: built without any on the meta device, compared with its folder, and only then allocated."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def meta_device() -> Iterator[None]:
    """Modules built inside are on the meta device, and nobody initialises their weights.

    Initialising meta tensors is no work, but it makes torch import its compiler: 1.5 s, longer than it takes to load a
    gigabyte. (`torch.empty_like` of a meta tensor imports sympy, so `allocate` does not use it.)
    """
    with torch.device("meta"), _Uninitialized():
        yield


class _Uninitialized(TorchFunctionMode):
    """Leaves tensors as they are where a random initialisation would fill them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {"tensor": args[0] if args else None} | (kwargs or {})
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", None) == nn.init.__name__:
            return given["tensor"]
        return func(*args, **(kwargs or {}))


def allocate(model: nn.Module, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
    """Replace a meta-device model's parameters and buffers by uninitialised ones. Tied parameters stay tied.

    Parameters become `dtype`, except those that carry an attribute ``keep_float32 = True`` (set by the layer that
    needs it, such as the indexer's ``weights_proj``), which become float32. Buffers keep their dtype: correction
    biases are float32 always, since bfloat16 has steps of 0.03 where published ones lie.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = _like(old, dtype, device)
                module._parameters[name] = made[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _like(old: nn.Parameter, dtype: torch.dtype, device: str | torch.device) -> nn.Parameter:
    keep = getattr(old, "keep_float32", False)
    data = torch.empty(old.shape, dtype=torch.float32 if keep else dtype, device=device)
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    if keep:
        setattr(new, "keep_float32", True)  # noqa: B010 (an attribute of ours on torch's class)
    return new
