"""The kernels around experts as sm_90 runs them."""

import pytest

pytest.importorskip("triton")

from sm90 import Kernel, compile_for_sm90

MODULE = "nautile.ops.triton.routing"


def test_they_compile_without_spills() -> None:
    gate = {"scores": "*fp32", "chosen": "*i64"} | dict.fromkeys(["T", "st", "K", "kept", "n_group", "size"], "i32")
    v3 = {"se": 1, "TOKENS": 8, "TILE_G": 8, "TILE_M": 32, "LIMITED": True, "TWO": True}
    move = {"x": "*bf16", "y": "*bf16", "weights": "*fp32", "D": "i32", "K": "i32"}
    dots = {"grad": "*bf16", "y": "*bf16", "rows": "*i64", "dots": "*fp32", "D": "i32", "K": "i32"}
    wide = {"WIDTH": 1024}
    reports = compile_for_sm90(
        [
            Kernel(MODULE, "_topk_gate", gate, v3),
            Kernel(MODULE, "_spread_rows", move | {"choices": "*i64", "xt": "i32"}, wide | {"xd": 1}),
            Kernel(MODULE, "_gather_rows", move | {"rows": "*i64", "yr": "i32"}, wide | {"yd": 1}),
            Kernel(MODULE, "_row_dots", dots | {"gt": "i32", "yr": "i32"}, wide | {"gd": 1, "yd": 1}),
        ]
    )
    for report in reports:
        report.check()
        # Rows move in 16 bytes per thread and instruction.
        assert report.name in ("_topk_gate",) or "ld.global.v4.b32" in report.ptx, report.name
