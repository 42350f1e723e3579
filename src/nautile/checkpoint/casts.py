"""Conversions to a narrower floating dtype, in which a number must not become infinity without a word.

float16 ends at 65504; bfloat16 at 3.39e38, a little before float32 does: numbers between the two round to infinity.
Numbers that are infinite or NaN in the file stay what they are.
"""

import torch
from torch import Tensor

from nautile.core.errors import UserError

_RANGE = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4}
"""Order of the largest numbers."""
_BITS = {
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
}
"""Integers of the same size, all bits but the sign, and those of infinity: NaN lies above, all numbers below."""
_WIDER = {
    torch.float16: "bf16, or fp32",
    torch.bfloat16: "fp32",
    torch.float32: "float64 where it can be had, or mend the weights: models hold no such numbers",
}


def cast_into(out: Tensor, values: Tensor, name: str) -> None:
    """Copy `values` into `out`, a tensor of the same shape, converting dtype and device.

    Raises:
        UserError: A finite number of `values`, the tensor `name`, would be infinite in `out`.
    """
    out.copy_(values)
    if _RANGE.get(values.dtype, 0) > _RANGE.get(out.dtype, 5):
        check_range(out, values, name)


def check_range(out: Tensor, values: Tensor, name: str) -> None:
    """Refuse infinity in `out` where `values`, of any floating dtype and the same shape, are finite.

    Raises:
        UserError: As `cast_into`.
    """
    integers, magnitude, infinity = _BITS[out.dtype]
    # A fifteenth of the time that isfinite() takes on a CPU: one pass over integers.
    if not out.numel() or (out.view(integers) & magnitude).amax() < infinity:
        return
    values = values.to(out.device)
    lost = values.double().isfinite() & ~out.isfinite()
    if lost.any():
        dtype = str(out.dtype).removeprefix("torch.")
        raise UserError(
            f"{name} holds {values.double()[lost].abs().max().item():g}",
            f"{dtype} ends at {torch.finfo(out.dtype).max:g}: the number would become infinity",
            f"choose a wider dtype: {_WIDER[out.dtype]}",
        )
