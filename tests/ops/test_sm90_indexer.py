"""The indexer's kernels as sm_90 code: tensor cores where products are, no spills, no more shared memory than there is."""

import pytest

pytest.importorskip("triton")

from sm90 import Kernel, compile_for_sm90

LOGITS = "nautile.ops.triton.index_logits"
TILE = {"BLOCK_T": 64, "BLOCK_J": 64, "BLOCK_I": 128}


def numbers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


KERNELS = {
    "mqa_logits": Kernel(
        LOGITS,
        "mqa_logits_kernel",
        {"q": "*fp8e4nv", "k": "*fp8e4nv", "weights": "*fp32", "scale": "*fp32", "start": "*i32", "end": "*i32"}
        | {"out": "*fp32"}
        | numbers("S", "T", "J", "I", "W", "stride_out", "chunk"),
        TILE | {"HAS_SCALE": True, "CLEAN": True, "COMPRESSED": False, "BLOCK_S": 2},
    ),
    "paged_mqa_logits": Kernel(
        LOGITS,
        "paged_mqa_logits_kernel",
        {"q": "*fp8e4nv", "keys": "*fp8e4nv", "scales": "*fp32", "weights": "*fp32", "lengths": "*i32"}
        | {"pages": "*i32", "out": "*fp32"}
        | numbers("N", "J", "I", "Y", "W", "stride_keys", "stride_scales", "stride_pages", "stride_out", "chunk"),
        TILE | {"CLEAN": False, "BLOCK_N": 2, "step_pages": 1},
    ),
}


def test_kernels_compile_for_sm90() -> None:
    for report in compile_for_sm90(list(KERNELS.values())):
        report.check(wgmma=True)
