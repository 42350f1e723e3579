"""FP4 (e2m1) numbers in pairs of a byte, with a scale per stretch of a row: casts only, products need SM100.

The eight magnitudes are 0, ½, 1, 1½, 2, 3, 4, 6; bit 3 is the sign. Of a pair, the first number is in the low bits.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile.compat.deep_gemm.errors import need
from nautile.compat.deep_gemm.utils.math import align, ceil_to_ue8m0, pack_ue8m0_to_int, unpack_ue8m0_from_int

LARGEST = 6.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
HALFWAY = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Between neighbouring magnitudes; a number halfway goes to the smaller one."""


def per_token_cast_to_fp4(
    x: Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """int8 [m, n / 2] and scales [m, ⌈n / gran_k⌉] of x [m, n], n even; packed scales are int32, four in each.

    Raises:
        DeepGemmError: Another shape, or packed scales that are not powers of two.
    """
    name = "per_token_cast_to_fp4"
    need(x.dim() == 2 and x.shape[1] % 2 == 0, name, f"x must be [m, n] with n even, got {list(x.shape)}")
    need(use_ue8m0 or not use_packed_ue8m0, name, "only UE8M0 scales can be packed")
    m, n = x.shape
    stretches = F.pad(x.float(), (0, align(n, gran_k) - n)).view(m, -1, gran_k)
    scale = stretches.abs().amax(-1).clamp(min=1e-4) / LARGEST
    scale = ceil_to_ue8m0(scale) if use_ue8m0 else scale
    scaled = (stretches * (1.0 / scale)[..., None]).view(m, -1)[:, :n]
    code = torch.bucketize(scaled.abs(), torch.tensor(HALFWAY, dtype=torch.float32, device=x.device)).to(torch.uint8)
    code |= ((scaled < 0) & (code > 0)).to(torch.uint8) << 3
    pairs = (code[:, 0::2] | code[:, 1::2] << 4).view(torch.int8)
    if not use_packed_ue8m0:
        return pairs, scale
    return pairs, pack_ue8m0_to_int(F.pad(scale, (0, -scale.shape[1] % 4), value=1.0))


def cast_back_from_fp4(packed: Tensor, sf: Tensor, gran_k: int = 128, use_packed_ue8m0: bool = False) -> Tensor:
    """float32 [m, n] of int8 [m, n / 2] and its scales."""
    scale = unpack_ue8m0_from_int(sf) if use_packed_ue8m0 else sf
    code = _codes(packed).long()
    magnitude = torch.tensor(MAGNITUDES, dtype=torch.float32, device=packed.device)[code & 7]
    value = torch.where(code >= 8, -magnitude, magnitude)
    return value * scale.repeat_interleave(gran_k, 1)[:, : value.shape[1]]


def transpose_packed_fp4(a: Tensor) -> Tensor:
    """int8 [n, m / 2] of int8 [m, n / 2], m even: the transpose, paired anew.

    Raises:
        DeepGemmError: Another shape or type.
    """
    need(
        a.dtype == torch.int8 and a.dim() == 2 and a.shape[0] % 2 == 0,
        "transpose_packed_fp4",
        f"a must be int8 [m, n / 2] with m even, got {a.dtype} {list(a.shape)}",
    )
    code = _codes(a).t()
    return (code[:, 0::2] | code[:, 1::2] << 4).contiguous().view(torch.int8)


def _codes(packed: Tensor) -> Tensor:
    """uint8 [m, n]: one number each."""
    both = packed.view(torch.uint8)
    return torch.stack([both & 15, both >> 4], dim=-1).flatten(1)
