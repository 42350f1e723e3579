"""FP8 latents byte by byte: both layouts against loops over tiles, what is not written, and what comes back."""

import math
import struct

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops.dispatch import TABLE
from nautile.ops.latent_layout import PAGE_MULTIPLE, PLANES, ROWS, LatentLayout, empty_latent_cache, latent_parts
from nautile.ops.reference.latent_bytes import dequantize_rows

BACKENDS = TABLE["store_latents"][1]
LAYOUTS = [ROWS, PLANES]


def latents(T: int, layout: LatentLayout, seed: int = 0) -> Tensor:
    """From tiny to huge, with a row of zeros and one whose largest number is just representable."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, layout.width, generator=g) * torch.logspace(-6, 4, T)[:, None]
    x[T // 2], x[T // 3] = 0.0, 448.0
    return x


def filled(N: int, P: int, layout: LatentLayout) -> Tensor:
    cache = empty_latent_cache(N, P, layout)
    whole(cache).fill_(0xA5)
    return cache


def whole(cache: Tensor) -> Tensor:
    return cache.as_strided((cache.untyped_storage().nbytes(),), (1,))


def expected_token(x_X: Tensor, layout: LatentLayout) -> tuple[bytes, bytes, bytes]:
    """e4m3 numbers, scales and rotated part of one token, tile by tile in Python's floats."""
    numbers, scales = b"", b""
    for j in range(layout.tiles):
        tile = x_X[j * layout.tile : (j + 1) * layout.tile].float()
        exponent = math.ceil(math.log2(max(tile.abs().max().item() / 448, 1e-4)))
        numbers += bytes((tile.double() / 2.0**exponent).float().to(torch.float8_e4m3fn).view(torch.uint8).tolist())
        scales += bytes([exponent + 127]) if layout.planes else struct.pack("<f", 2.0**exponent)
    return numbers, scales, bytes(x_X[layout.fp8 :].bfloat16().view(torch.uint8).tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_bytes_of_a_cache(layout: LatentLayout, dtype: torch.dtype, backend: str) -> None:
    N, P, F, R = 3, 5, layout.fp8, layout.rope
    x_TX = latents(12, layout).to(dtype)
    rows = [14, 0, 3, 7, 8, 2, 11, 5, -1, 15, 2**31 - 1, 9]
    want = filled(N, P, layout)
    bytes_of = whole(want).numpy()
    for x_X, row in zip(x_TX, rows, strict=True):
        if not 0 <= row < N * P:
            continue
        page, place = row // P * want.stride(0), row % P
        numbers, scales, rope = expected_token(x_X, layout)
        if layout.planes:
            at = page + place * (F + 2 * R)
            bytes_of[at : at + F + 2 * R] = list(numbers + rope)
            at = page + P * (F + 2 * R) + 8 * place
            bytes_of[at : at + len(scales)] = list(scales)
        else:
            at = page + place * layout.bytes
            bytes_of[at : at + layout.bytes] = list(numbers + scales + rope)
    got = filled(N, P, layout)
    with ops.use(backend):
        ops.store_latents(x_TX, got, torch.tensor(rows, dtype=torch.int32))
    assert torch.equal(whole(got), whole(want))


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter divides with NumPy
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_what_is_not_finite_stays_in_its_tile_and_gaps_are_read_over(layout: LatentLayout, backend: str) -> None:
    x_TX = latents(9, layout).repeat_interleave(2, dim=1)[:, ::2]
    assert not x_TX.is_contiguous()
    x_TX[4, 3], x_TX[5, layout.tile] = float("nan"), float("-inf")
    caches = []
    for name in (backend, "reference"):
        caches.append(filled(2, 5, layout))
        with ops.use(name):
            ops.store_latents(x_TX, caches[-1], torch.arange(9))
    assert torch.equal(*(whole(cache) for cache in caches))
    back = dequantize_rows(caches[0], torch.arange(9), torch.float32)
    tiles = back[:, : layout.fp8].unflatten(1, (layout.tiles, layout.tile)).isfinite().all(-1)
    assert (~tiles).nonzero().tolist() == [[4, 0], [5, 1]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_there_and_back(layout: LatentLayout) -> None:
    x_NPX = latents(14, layout).view(2, 7, -1).bfloat16()
    cache = ops.quantize_latents(x_NPX)
    assert cache.shape == (2, 7, layout.bytes) and cache.dtype == torch.uint8
    back = dequantize_rows(cache, torch.arange(14), torch.bfloat16).view_as(x_NPX)
    assert torch.equal(back[..., layout.fp8 :], x_NPX[..., layout.fp8 :])
    tiles = x_NPX[..., : layout.fp8].float().unflatten(-1, (layout.tiles, layout.tile))
    error = (back[..., : layout.fp8].float().unflatten(-1, (layout.tiles, layout.tile)) - tiles).abs()
    # Half a unit in the last of three bits, or of the smallest subnormal step where scales end.
    largest = tiles.abs().amax(-1, keepdim=True).clamp_min(448 * 2.0**-13)
    assert (error <= torch.maximum(tiles.abs() / 16, largest * 2 / 448 * 2.0**-10)).all()
    as_fp8 = dequantize_rows(cache.view(torch.float8_e4m3fn), torch.arange(14), torch.bfloat16)
    assert torch.equal(back, as_fp8.view_as(x_NPX))


def test_pages_begin_where_flash_mla_wants_them() -> None:
    assert empty_latent_cache(3, 61, PLANES).stride() == (-(-61 * 584 // PAGE_MULTIPLE) * PAGE_MULTIPLE, 584, 1)
    assert empty_latent_cache(3, 61, ROWS).stride() == (61 * 656, 656, 1)
    parts = latent_parts(empty_latent_cache(2, 3, PLANES))
    assert [x.shape[-1] for x in (parts.fp8_NPF, parts.scale_NPJ, parts.rope_NPR)] == [448, 7, 64]


def test_bad_input() -> None:
    cache, rows = empty_latent_cache(2, 5, ROWS), torch.arange(3)
    with pytest.raises(ValueError, match=r"\[T, 576\] for 656-byte rows, got torch.float32 \[3, 512\]"):
        ops.store_latents(torch.zeros(3, 512), cache, rows)
    with pytest.raises(ValueError, match="float64"):
        ops.store_latents(torch.zeros(3, 576).double(), cache, rows)
    with pytest.raises(ValueError, match=r"\[T\] = \[3\], got torch.float32 \[3\]"):
        ops.store_latents(torch.zeros(3, 576), cache, rows.float())
    with pytest.raises(ValueError, match="no gaps, got strides"):
        ops.store_latents(torch.zeros(3, 576), cache[:, ::2], rows)
    with pytest.raises(ValueError, match=r"int32 \[2, 5, 656\]"):
        ops.store_latents(torch.zeros(3, 576), cache.int(), rows)
    shifted = torch.empty(2 * 5 * 656 + 1, dtype=torch.uint8)[1:].view(2, 5, 656)
    with pytest.raises(ValueError, match="multiples of 16 bytes, got stride 3280 and offset 1"):
        ops.store_latents(torch.zeros(3, 576), shifted, rows)
    with pytest.raises(ValueError, match=r"got \[2, 3, 500\]"):
        ops.quantize_latents(torch.zeros(2, 3, 500))
