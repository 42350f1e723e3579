"""Writing latents as FP8 bytes on a GPU: one program per token.

X dimensions, of which the first F in tiles of Y with a scale each; P places of a page; J scales.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nautile.ops.latent_layout import SMALLEST_SCALE, latent_parts, layout_of
from nautile.ops.triton import support


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The usual floats, where the device knows FP8."""
    return support.floats(device, dtype) or support.fp8(device, torch.float8_e4m3fn)


def store_latents(latents_TX: Tensor, cache_NPZ: Tensor, rows_T: Tensor) -> None:
    """See `nautile.ops.store_latents`."""
    if not len(rows_T):
        return
    layout, parts = layout_of(cache_NPZ), latent_parts(cache_NPZ)
    views = parts.fp8_NPF, parts.scale_NPJ, parts.rope_NPR
    store_latents_kernel[(len(rows_T),)](
        latents_TX, rows_T.contiguous(), *views, cache_NPZ.shape[0], cache_NPZ.shape[1], *latents_TX.stride(),
        *(view.stride(0) for view in views), *(view.stride(1) for view in views), SMALLEST_SCALE,
        F=layout.fp8, TILE=layout.tile, ROPE=layout.rope, EXPONENTS=layout.planes,
        BLOCK_J=support.next_power_of_two(layout.tiles), num_warps=1,
    )  # fmt: skip


@triton.jit
def store_latents_kernel(
    latents, rows, fp8, scales, rope, N, P, stride_token, step_token,
    stride_fp8, stride_scales, stride_rope, row_fp8, row_scales, row_rope, smallest,
    F: tl.constexpr, TILE: tl.constexpr, ROPE: tl.constexpr, EXPONENTS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Program t: ``s_j = 2^⌈log2 max(max |x| / 448, smallest)⌉`` from the bits, then x / s_j, saturated."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + token).to(tl.int64)
    page, place = row // P, row % P
    if (row < 0) | (page >= N):
        return
    j_J, y_Y, r_R = tl.arange(0, BLOCK_J), tl.arange(0, TILE), tl.arange(0, ROPE)
    f_JY = j_J[:, None] * TILE + y_Y[None, :]
    x = latents + token * stride_token
    x_JY = tl.load(x + f_JY * step_token, mask=f_JY < F, other=0.0).to(tl.float32)
    scale_J = tl.maximum(tl.div_rn(tl.max(tl.abs(x_JY), 1), 448.0), smallest)
    bits_J = (scale_J.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    bits_J = tl.where(tl.max((x_JY != x_JY).to(tl.int32), 1) > 0, 0x7FC00000, bits_J)
    scale_J = bits_J.to(tl.float32, bitcast=True)
    e4m3_JY = tl.div_rn(x_JY, scale_J[:, None])
    e4m3_JY = tl.where(e4m3_JY == e4m3_JY, tl.minimum(tl.maximum(e4m3_JY, -448.0), 448.0), e4m3_JY)
    tl.store(fp8 + page * stride_fp8 + place * row_fp8 + f_JY, e4m3_JY.to(tl.float8e4nv), mask=f_JY < F)
    scales_J = scales + page * stride_scales + place * row_scales + j_J
    if EXPONENTS:
        tl.store(scales_J, (bits_J >> 23).to(tl.uint8), mask=j_J * TILE < F)
    else:
        tl.store(scales_J, scale_J, mask=j_J * TILE < F)
    rope_R = tl.load(x + (F + r_R) * step_token)
    tl.store(rope + page * stride_rope + place * row_rope + r_R, rope_R.to(tl.bfloat16))
