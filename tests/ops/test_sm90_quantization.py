"""The quantisers as sm_90 runs them."""

import pytest

pytest.importorskip("triton")

from sm90 import Kernel, compile_for_sm90

STRIDES = [f"{tensor}{dim}" for tensor in "xgds" for dim in "brc"]
BLOCKS = {"GIVEN_R": 1, "GIVEN_C": 128}


def quantiser(constants: dict, dtype: str = "*bf16", num_warps: int = 4) -> Kernel:
    signature = {"x": dtype, "data": "*fp8e4nv", "scale": "*fp32", "R": "i32", "C": "i32"}
    signature |= dict.fromkeys(STRIDES, "i32")
    if "x_scale" not in constants:
        signature["x_scale"] = "*fp32"
    return Kernel("nautile.ops.triton.quantization", "_quantize", signature, BLOCKS | constants, num_warps)


def test_they_compile_without_spills() -> None:
    rows = {"ROWS": 32, "COLUMNS": 128, "TILE_R": 32, "TILE_C": 128, "WHOLE": False}
    square = {"ROWS": 128, "COLUMNS": 128, "TILE_R": 128, "TILE_C": 128, "WHOLE": True}
    reports = compile_for_sm90(
        [
            quantiser({**rows, "x_scale": None, "UE8M0": False}),
            quantiser({**square, "x_scale": None, "UE8M0": True}, num_warps=8),
            quantiser({**rows, "GIVEN_R": 128, "GIVEN_C": 1, "UE8M0": True}, dtype="*fp8e4nv"),
        ]
    )
    for report in reports:
        report.check()
        assert "cvt.rn.satfinite.e4m3x2.f32" in report.ptx
        assert "div.rn.f32" in report.ptx
        assert "div.full" not in report.ptx
