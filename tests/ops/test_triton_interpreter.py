"""The interpreter's defects with bfloat16 and FP8: still there without our repairs, gone with them."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, sys, torch, triton, triton.language as tl
if sys.argv[1] == "repaired":
    from nautile.ops.triton.interpreter import repair
    repair()

@triton.jit
def product(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))

@triton.jit
def cast(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))

def after(x, dtype):
    y = torch.zeros(x.shape, dtype=dtype)
    cast[(1,)](x, y, N=x.numel())
    return y

def same(x, y):
    return bool(((x.float() == y.float()) | (x.float().isnan() & y.float().isnan())).all())

torch.manual_seed(0)
x = torch.cat([torch.randn(4096), torch.randn(4096) * 1e-3, torch.randn(8192) * 200])
special = torch.tensor([500.0, -464.0, 7.935, 448.0, float("nan"), 0.0, -0.0, 1e-9])
found = {}
for dtype in (torch.bfloat16, torch.float8_e4m3fn):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    c = torch.zeros(16, 16)
    try:
        product[(1,)](a, b, c, N=16)
        found[f"dot {dtype}"] = bool((c - a.float() @ b.float()).abs().max() < 1e-5)
    except Exception:
        found[f"dot {dtype}"] = False
found["round to bf16"] = same(after(x, torch.bfloat16), x.to(torch.bfloat16))
found["round to e4m3"] = same(after(x, torch.float8_e4m3fn), x.clamp(-448, 448).to(torch.float8_e4m3fn))
found["special e4m3"] = same(after(special, torch.float8_e4m3fn), special.clamp(-448, 448).to(torch.float8_e4m3fn))
codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
found["all e4m3 codes"] = same(after(codes, torch.float32), codes.float())
print(json.dumps(found))
"""


def outcomes(which: str, tmp_path) -> dict[str, bool]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), which],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_repaired_interpreter_rounds_and_multiplies_right(tmp_path) -> None:
    assert all((found := outcomes("repaired", tmp_path)).values()), found


def test_the_repairs_are_still_needed(tmp_path) -> None:
    """When this fails, Triton has mended its interpreter, and `ops/triton/interpreter.py` can go."""
    found = outcomes("as it is", tmp_path)
    assert found.pop("dot torch.float8_e4m3fn"), "the one thing that was right"
    assert not any(found.values()), found
