"""The quantisers as sm_90 runs them: no spills, divisions of IEEE where scales and numbers are made."""

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
    swiglu = {"gate_up": "*bf16", "weight": "*fp32"}
    forward = {"data": "*fp8e4nv", "scale": "*fp32"} | dict.fromkeys(["R", "C", "xr", "xc", "to_up"], "i32")
    backward = {"grad": "*bf16", "rows": "*fp8e4nv", "columns": "*fp8e4nv", "parts": "*fp32"}
    backward |= {"row_scale": "*fp32", "column_scale": "*fp32"} | dict.fromkeys(["T", "F", "gt", "xt"], "i32")
    module = "nautile.ops.triton.swiglu_quantization"
    twelve = {"x": "*bf16", "words": "*i32", "scale": "*fp32"} | dict.fromkeys(["R", "C", "xr"], "i32")
    reports = compile_for_sm90(
        [
            Kernel(module, "_forward", swiglu | forward, {"ROWS": 32, "TRANSPOSED": True, "UE8M0": False}),
            Kernel(module, "_backward", swiglu | backward, {"gf": 1, "xf": 1, "UE8M0": False}, num_warps=16),
            Kernel("nautile.ops.triton.e5m6", "_pack_rows", twelve, {"xc": 1, "BLOCK": 128, "ROWS": 32, "GROUPS": 16}),
            quantiser({**rows, "x_scale": None, "UE8M0": False}),
            quantiser({**square, "x_scale": None, "UE8M0": True}, num_warps=8),
            quantiser({**rows, "GIVEN_R": 128, "GIVEN_C": 1, "UE8M0": True}, dtype="*fp8e4nv"),
        ]
    )
    for report in reports:
        report.check()
        assert report.name == "_pack_rows" or "cvt.rn.satfinite.e4m3x2.f32" in report.ptx
        assert "div.rn.f32" in report.ptx
        assert report.name != "_quantize" or "div.full" not in report.ptx
