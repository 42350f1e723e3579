"""DeepGEMM's casts to FP8 and its power-of-two scales, bit for bit (a scale is amax / 448, amax at least 1e-4)."""

import torch
from torch import Tensor

from nautile.compat.deep_gemm.errors import need
from nautile.ops import quantize_fp8
from nautile.ops.fp8_tensor import LARGEST
from nautile.ops.reference.quantization import SMALLEST_AMAX
from nautile.ops.scale_packing import ceil_to_ue8m0, pack_ue8m0, unpack_ue8m0


def ceil_div(x: int, y: int) -> int:
    """⌈x / y⌉."""
    return -(-x // y)


def align(x: int, y: int) -> int:
    """The smallest multiple of y that is ≥ x."""
    return ceil_div(x, y) * y


def pack_ue8m0_to_int(x: Tensor) -> Tensor:
    """int32 [.., n / 4] of float32 powers of two [.., n]: their exponents as bytes, the first in the lowest."""
    need(
        x.dtype == torch.float32 and x.shape[-1] % 4 == 0,
        "pack_ue8m0_to_int",
        f"x must be float32 [.., n] with n a multiple of 4, got {x.dtype} {list(x.shape)}",
    )
    bits = x.view(torch.int32)
    need(bool(((bits >= 0) & (bits & 0x7FFFFF == 0)).all()), "pack_ue8m0_to_int", "x must hold powers of two")
    return pack_ue8m0(x)


def unpack_ue8m0_from_int(packed_sf: Tensor) -> Tensor:
    """float32 [.., 4 n] of int32 [.., n]."""
    return unpack_ue8m0(packed_sf)


def per_token_cast_to_fp8(
    x: Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [m, n] and a scale [m, ⌈n / gran_k⌉] for each stretch of a row."""
    need(x.dim() == 2, "per_token_cast_to_fp8", f"x must be [m, n], got {list(x.shape)}")
    cast = quantize_fp8(x, (1, gran_k), ue8m0=use_ue8m0)
    return cast.data, pack_ue8m0_to_int(cast.scale) if use_packed_ue8m0 else cast.scale


def per_channel_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [m, n] and a scale [m / gran_k, n] for each stretch of a column."""
    fits = x.dim() == 2 and x.shape[0] % gran_k == 0
    need(fits, "per_channel_cast_to_fp8", f"x must be [m, n] with m a multiple of {gran_k}, got {list(x.shape)}")
    cast = quantize_fp8(x, (gran_k, 1), ue8m0=use_ue8m0)
    return cast.data, cast.scale


def per_block_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [m, n] and a scale [⌈m / gran_k⌉, ⌈n / gran_k⌉] for each square."""
    need(x.dim() == 2, "per_block_cast_to_fp8", f"x must be [m, n], got {list(x.shape)}")
    cast = quantize_fp8(x, (gran_k, gran_k), ue8m0=use_ue8m0)
    return cast.data, cast.scale


def per_custom_dims_cast_to_fp8(x: Tensor, dims: tuple[int, ...], use_ue8m0: bool) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn like x, and a scale for each index of the dimensions `dims`, dimensions of size 1 left out."""
    others = tuple(dim for dim in range(x.dim()) if dim not in dims)
    scale = x.abs().float().amax(others, keepdim=True).clamp(min=SMALLEST_AMAX) / LARGEST
    scale = ceil_to_ue8m0(scale) if use_ue8m0 else scale
    return (x * (1.0 / scale)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale.squeeze()
