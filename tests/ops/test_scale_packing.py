"""Scales rounded up to powers of two, packed four to a word, and laid out for a TMA."""

import math

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops.dispatch import TABLE
from nautile.ops.scale_packing import ceil_to_ue8m0, pack_ue8m0, tma_aligned, unpack_ue8m0

BACKENDS = TABLE["mn_major_scales"][1]


def powers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.ldexp(torch.ones(shape), torch.randint(-126, 128, shape, generator=generator))


def test_rounded_up_to_a_power_of_two() -> None:
    x = torch.cat([torch.rand(500) * 10, powers(200), torch.tensor([1.0, 1.0000001, 1.4, 1.5, 3e-38, 1.7e38])])
    for got, value in zip(ceil_to_ue8m0(x).tolist(), x.tolist(), strict=True):
        assert got == 2.0 ** math.ceil(math.log2(value))
    ends = torch.tensor([0.0, 1e-45, 3.4e38, -3.0])
    assert ceil_to_ue8m0(ends).tolist() == [2.0**-126, 2.0**-126, 2.0**127, 4.0]


def test_the_first_of_four_is_in_the_lowest_byte() -> None:
    scale = torch.tensor([[1.0, 2.0, 0.5, 4.0, 8.0]])
    assert pack_ue8m0(scale).tolist() == [[127 | 128 << 8 | 126 << 16 | 129 - 256 << 24, 130]]


@pytest.mark.parametrize("blocks", [1, 4, 7])
def test_unpacking_undoes_packing(blocks: int) -> None:
    scale = powers(3, 5, blocks)
    unpacked = unpack_ue8m0(pack_ue8m0(scale.mT.contiguous().mT))
    assert torch.equal(unpacked[..., :blocks], scale)
    assert not unpacked[..., blocks:].any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (8, 4), (70, 9), (2, 3, 6), (1, 1), (0, 3), (2, 0)], ids=str)
def test_layout(shape: tuple[int, ...], packed: bool) -> None:
    pytest.importorskip("triton")
    scale = powers(*shape)
    want = pack_ue8m0(scale) if packed else scale
    rows = tma_aligned(shape[-2], 4)
    for source in (scale, scale.mT.contiguous().mT, torch.full((*shape, 2), torch.nan)[..., 0].copy_(scale)):
        for backend in BACKENDS:
            with ops.use(backend):
                got = ops.mn_major_scales(source, packed)
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
            if got.numel() and got is not source:
                assert got.stride()[-2:] == (1, rows)
                filled = got.as_strided((*shape[:-2], want.shape[-1], rows), (*got.stride()[:-2], rows, 1))
                assert not filled[..., shape[-2] :].any()


def test_what_is_laid_out_already_stays() -> None:
    once = ops.mn_major_scales(powers(2, 5, 3))
    assert ops.mn_major_scales(once) is once
    assert ops.mn_major_scales(once[:, :4]).stride() == (12, 1, 4)


def test_units_of_sixteen_bytes() -> None:
    assert [tma_aligned(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert tma_aligned(17, 1) == 32


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"scale must be float32 \[..., M, J\], got torch.float64 \[2, 2\]"):
        ops.mn_major_scales(torch.ones(2, 2).double())
    with pytest.raises(ValueError, match="must be powers of two; quantise with ue8m0=True"):
        ops.mn_major_scales(torch.tensor([[3.0]]), packed=True)
