"""12-bit numbers: a loop over a table of all of them, torch's float16, and Triton bit for bit."""

import math

import pytest
import torch

from nautile import ops
from nautile.ops.dispatch import TABLE
from nautile.ops.numerics import calc_diff
from nautile.ops.reference.e5m6 import codes, packed, unpacked

BACKENDS = TABLE["quantize_e5m6"][1]


def numbers() -> list[float]:
    """In the order of their codes: 5 bits of exponent with bias 15, 6 of mantissa."""
    small = [m / 64 * 2.0**-14 for m in range(64)]
    return small + [(1 + m / 64) * 2.0 ** (e - 15) for e in range(1, 31) for m in range(64)]


def test_rounds_to_the_nearest_even_of_the_table() -> None:
    table = numbers()
    assert table[-1] == 65024
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, generator=generator) * 10.0 ** torch.randint(-8, 5, (120,), generator=generator)
    between = [(a + b) / 2 for a, b in zip(table[::97], table[1::97], strict=True)]
    x = torch.cat([x.clamp(-65024, 65024), torch.tensor([0.0, -0.0, 65024.0, -1e-9, *between])])
    want = [min(range(len(table)), key=lambda i: (abs(table[i] - abs(v)), i % 2)) for v in x.tolist()]
    signs = [0x800 if math.copysign(1, v) < 0 else 0 for v in x.tolist()]
    assert codes(x).tolist() == [code | sign for code, sign in zip(want, signs, strict=True)]


def test_every_finite_code_is_the_beginning_of_a_float16() -> None:
    table = torch.tensor(numbers())
    data = packed(torch.arange(len(table), dtype=torch.int32)[None])
    assert data.shape == (1, len(table) * 3 // 2)
    assert torch.equal(unpacked(data)[0], torch.arange(len(table), dtype=torch.int32))
    assert torch.equal(table.half().view(torch.int16).int() >> 4, torch.arange(len(table), dtype=torch.int32))


def test_the_first_number_has_the_highest_bits() -> None:
    words = packed(torch.tensor([[0x123, 0x456, 0x789, 0xABC, 0xDEF, 0x012, 0x345, 0x678]])).view(torch.int32)
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0x12345678, 0x9ABCDEF0, 0x12345678]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "block"), [((5, 200), 128), ((2, 3, 24), 24), ((33, 128), 128), ((0, 8), 8)], ids=str
)
def test_backends_agree(shape: tuple[int, ...], block: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = (x * 10.0 ** (torch.arange(shape[-2]) % 7 - 3)[:, None]).to(dtype)
    found = []
    for backend in BACKENDS:
        with ops.use(backend):
            for source in (x, x.mT.contiguous().mT):
                q = ops.quantize_e5m6(source, block)
                found.append((q.data, q.scale, ops.dequantize_e5m6(q, torch.float32), ops.dequantize_e5m6(q)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    q, back = found[0], found[0][2]
    assert q[0].shape == (*shape[:-1], shape[-1] * 3 // 2)
    assert q[1].shape == (*shape[:-1], -(-shape[-1] // block))
    if x.numel():
        assert calc_diff(back, x) < 2e-5
        large = x.float().abs() > x.float().abs().amax(-1, keepdim=True) * 1e-3
        assert ((back - x.float()).abs()[large] <= x.float().abs()[large] * 2**-7).all()


def test_what_they_refuse() -> None:
    with pytest.raises(ValueError, match=r"C a multiple of 8, got torch.float32 \[2, 12\]"):
        ops.quantize_e5m6(torch.ones(2, 12))
    with pytest.raises(ValueError, match="block must be a positive multiple of 8, got 12"):
        ops.quantize_e5m6(torch.ones(2, 16), 12)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        ops.quantize_e5m6(torch.full((2, 16), torch.inf))
    with pytest.raises(ValueError, match=r"got torch.float64"):
        ops.dequantize_e5m6(ops.quantize_e5m6(torch.ones(2, 16)), torch.float64)
