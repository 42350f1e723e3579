"""Weights as a processor reads them fastest: from one end to the other, 64 bytes at a time, and if asked in few bits.

Outputs are cut into panels of 32, filled up with zeros; a panel holds its inputs in units of 4. A unit is 2 steps of 2
inputs × 2 halves of 16 outputs, so that 64 bytes of bfloat16 are 16 outputs × 2 neighbouring inputs: what one
AVX512_BF16 instruction multiplies.

Dims: E experts (any leading dimensions), O outputs, D inputs, P panels, U units of 4 inputs, G groups of inputs,
S = 2 steps of a unit, H = 2 halves of a panel, L = 16 outputs of a half, I = 2 inputs of a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["bf16", "int8", "int4"]

PANEL = 32
"""Outputs of a panel."""
UNIT = 4
"""Inputs of a unit."""
BITS: Mapping[Kind, int] = MappingProxyType({"bf16": 16, "int8": 8, "int4": 4})
GROUP: Mapping[Kind, int] = MappingProxyType({"bf16": 0, "int8": 128, "int4": 64})
"""Inputs that share a scale, unless `pack_weight` is told otherwise."""


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [O, D], or a stack [E, O, D] of them, made by `pack_weight`."""

    data: Tensor
    """bf16: bfloat16 [..., P, U, S, H, L, I]; int8: the same in int8; int4: int16 [..., P, U, L, I], in which number
    (s, h) is nibble 2 s + h, two's complement."""
    scale: Tensor | None
    """float32 [..., P, G, 32], to multiply by; none for bf16."""
    kind: Kind
    outputs: int
    inputs: int
    group: int
    """Inputs that share a scale; 0 for bf16."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that was packed."""
        lead = self.data.shape[: -4 if self.kind == "int4" else -6]
        return (*lead, self.outputs, self.inputs)

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads, filling and scales included."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def __getitem__(self, expert: int) -> "PackedWeight":
        """One matrix of a stack, without a copy."""
        if len(self.shape) < 3:
            raise IndexError(f"this packed weight is one matrix {list(self.shape)}, no stack")
        return replace(self, data=self.data[expert], scale=None if self.scale is None else self.scale[expert])

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [..., O, D] that products are made with."""
        rows = _from_panels(_nibbles(self.data) if self.kind == "int4" else self.data)
        if self.scale is not None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            scale = self.scale.transpose(-1, -2).flatten(-3, -2).to(wide)  # [..., P·32, G]
            rows = rows.to(wide) * scale.repeat_interleave(self.group, -1)[..., : rows.shape[-1]]
        return rows[..., : self.outputs, : self.inputs].to(dtype)


def pack_weight(weight: Tensor, kind: Kind = "bf16", group: int | None = None) -> PackedWeight:
    """Packs [O, D], or a stack [E, O, D], for `nautile.ops.packed_linear`.

    bf16 rounds to bfloat16. The others keep, for every output and group of inputs, integers and one float32 scale:
    int8 from -127 to 127 with scale = amax / 127; int4 from -8 to 7 with scale = m / -8, where m is the number of the
    group that is largest in magnitude.

    Args:
        weight: Any floating dtype.
        kind: "bf16", "int8" or "int4".
        group: Inputs that share a scale, a multiple of 4; 128 for int8 and 64 for int4 unless given.

    Raises:
        ValueError: Not a matrix or a stack of them, or an empty one; an unknown kind; a group that is no multiple of
            4, or one for bf16; NaN or infinity where integers are asked for.
    """
    if weight.dim() < 2 or not weight.is_floating_point() or not weight.numel():
        got = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"pack_weight: weight must be floating [..., O, D] and not empty, got {got}")
    if kind not in BITS:
        raise ValueError(f"pack_weight: kind must be one of {', '.join(BITS)}, got {kind!r}")
    group = GROUP[kind] if group is None else group
    if kind == "bf16" and group:
        raise ValueError(f"pack_weight: bf16 has no scales, so group must not be given, got {group}")
    if kind != "bf16" and (group <= 0 or group % UNIT):
        raise ValueError(f"pack_weight: group must be a positive multiple of {UNIT}, got {group}")
    weight = weight.detach()
    outputs, inputs = weight.shape[-2:]
    if kind == "bf16":
        return PackedWeight(_panels(weight.to(torch.bfloat16)), None, kind, outputs, inputs, 0)
    if not weight.isfinite().all():
        raise ValueError(f"pack_weight: weight holds NaN or infinity, which {kind} cannot")
    numbers, scale = _quantize(weight, kind, group)
    data = _panels(numbers.to(torch.int8))
    scale_PGO = _filled(scale, -2, PANEL).unflatten(-2, (-1, PANEL)).transpose(-1, -2).contiguous()
    return PackedWeight(_words(data) if kind == "int4" else data, scale_PGO, kind, outputs, inputs, group)


def _quantize(weight: Tensor, kind: Kind, group: int) -> tuple[Tensor, Tensor]:
    """Whole numbers [..., O, D], and scales [..., O, G] in float32."""
    inputs = weight.shape[-1]
    groups = _filled(weight.float(), -1, group).unflatten(-1, (-1, group))
    if kind == "int8":
        low, high = -127, 127
        scale = groups.abs().amax(-1) / 127
    else:
        low, high = -8, 7
        scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8
    numbers = groups / torch.where(scale == 0, 1.0, scale)[..., None]
    return numbers.round().clamp(low, high).flatten(-2)[..., :inputs], scale


def _filled(x: Tensor, dim: int, multiple: int) -> Tensor:
    """With zeros at the end of a dimension, to a multiple."""
    missing = -x.shape[dim] % multiple
    return F.pad(x, [0, 0] * (-1 - dim) + [0, missing]) if missing else x


def _panels(weight: Tensor) -> Tensor:
    """[..., O, D] → [..., P, U, S, H, L, I]."""
    full = _filled(_filled(weight, -1, UNIT), -2, PANEL)
    panels = full.unflatten(-1, (-1, 2, 2)).unflatten(-4, (-1, 2, PANEL // 2))  # [..., P, H, L, U, S, I]
    return panels.movedim((-3, -2), (-5, -4)).contiguous()


def _from_panels(data: Tensor) -> Tensor:
    """The way back, filling included."""
    return data.movedim((-5, -4), (-3, -2)).flatten(-3).flatten(-4, -2)


def _words(numbers: Tensor) -> Tensor:
    """int8 [..., U, S, H, L, I] → int16 [..., U, L, I]."""
    word = torch.zeros(*numbers.shape[:-4], *numbers.shape[-2:], dtype=torch.int32, device=numbers.device)
    for nibble in range(4):
        word |= (numbers[..., nibble // 2, nibble % 2, :, :].int() & 15) << (4 * nibble)
    return word.to(torch.int16)


def _nibbles(words: Tensor) -> Tensor:
    """The way back, as int8."""
    wide = words.int()
    numbers = torch.stack([((wide >> (4 * nibble)) & 15) for nibble in range(4)], -3).to(torch.int8)
    return torch.where(numbers > 7, numbers - 16, numbers).unflatten(-3, (2, 2))
