"""RMSNorm in native code: against float64, on every kind of processor, and when it runs."""

from pathlib import Path

import pytest
import torch

from nautile import ops
from nautile.core import jit
from nautile.ops.cpu import norm
from nautile.ops.reference.norm import rms_norm as formula

pytestmark = pytest.mark.skipif(jit.why_no_cxx() is not None, reason=str(jit.why_no_cxx()))

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
FLAGS = {"this": (), "avx2": ("-march=x86-64-v3",), "plain": ("-march=x86-64",)}
UNIT = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("processor", FLAGS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_equals_the_formula(
    dtypes: tuple[torch.dtype, torch.dtype], processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(norm.__file__).parent / "native"
    library = jit.load_cxx(folder / "norm.cpp", folder / "lanes.h", flags=FLAGS[processor])
    name = "rms_norm_" + "_".join(norm._NAMES[dtype] for dtype in dtypes)
    monkeypatch.setattr(norm, "_function", lambda *_: norm.declared(library, name))
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (3, 5), (2, 3, 64), (5, 131), (2, 1, 1000), (150, 1024), (0, 7)):
        for size in (1.0, 1e-4, 1e3):
            x = (size * torch.randn(shape, generator=generator)).to(dtypes[0])
            weight = torch.randn(shape[-1], generator=generator).to(dtypes[1])
            with torch.no_grad():
                got = ops.rms_norm(x, weight, 1e-6)
            want = formula(x.double(), weight.double(), 1e-6)
            assert got.dtype == dtypes[0]
            assert got.shape == want.shape
            assert ((got.double() - want).abs() <= UNIT[dtypes[0]] * want.abs()).all()


def test_rows_with_gaps_and_any_strides() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * 33, generator=generator)[::2]
    for x in (torch.randn(4, 70, generator=generator)[:, 5:38], torch.randn(33, 4, generator=generator).t()):
        with torch.inference_mode():
            got = ops.rms_norm(x, weight, 1e-5)
        torch.testing.assert_close(got, formula(x, weight, 1e-5), atol=1e-6, rtol=1e-6)


def test_runs_only_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    native = norm._native_rms_norm
    monkeypatch.setattr(norm, "_native_rms_norm", lambda *a: calls.append(a[0].dtype) or native(*a))
    x, weight = torch.ones(2, 3), torch.ones(3, requires_grad=True)
    ops.rms_norm(x, weight, 1e-6).sum().backward()
    with torch.no_grad():
        ops.rms_norm(x, weight, 1e-6)
        ops.rms_norm(x.double(), weight.double(), 1e-6)
        ops.rms_norm(x, weight.bfloat16(), 1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.rms_norm(x, weight, 1e-6).dtype == torch.bfloat16
    assert calls == [torch.float32]


def test_gradients_do_not_depend_on_native_code() -> None:
    """What training sees is the path with a backward; the two differ by roundings only."""
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(300, requires_grad=True)
    with torch.no_grad():
        plain = ops.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(plain, ops.rms_norm(x, weight, 1e-6).detach(), atol=1e-6, rtol=1e-6)
