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


@torch.inference_mode(False)
def allocate(model: nn.Module, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
    """Replace a meta-device model's parameters and buffers by uninitialised ones. Tied parameters stay tied.

    Also inside ``torch.inference_mode()`` they are ordinary tensors: readers in other threads may fill them, and the
    model may be trained.

    Parameters become `dtype`, except those that a module names in its ``keep_float32`` (`float32_names`), which become
    float32. Buffers keep their dtype: correction biases are float32 always, since bfloat16 has steps of 0.03 where
    published ones lie.
    """
    made: dict[int, nn.Parameter] = {}
    wide = {id(model.get_parameter(name)) for name in float32_names(model)}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = _like(old, torch.float32 if id(old) in wide else dtype, device)
                module._parameters[name] = made[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _like(old: nn.Parameter, dtype: torch.dtype, device: str | torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(old.shape, dtype=dtype, device=device), requires_grad=old.requires_grad)


def float32_names(model: nn.Module) -> list[str]:
    """Names of the parameters that stay float32 whatever the dtype of the model.

    A module lists its own in an attribute ``keep_float32``, relative to itself, as the indexer does.
    """
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "keep_float32", ())
    ]
