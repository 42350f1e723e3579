"""The indexer's kernels as sm_90 code: tensor cores where products are, no spills, not too much shared memory."""

import pytest

pytest.importorskip("triton")

from sm90 import SHARED_LIMIT, Kernel, compile_for_sm90

from nautile.ops.triton.index_tiles import scoring
from nautile.ops.triton.indexer_loss import block_for

LOGITS = "nautile.ops.triton.index_logits"
INDEXER = "nautile.ops.triton.indexer"
FLOAT32, LAUNCH = scoring(64, 128, 4)
TILE = {"BLOCK_T": 64, "BLOCK_J": 64, "BLOCK_I": 128}


def numbers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


KERNELS = {
    "scores_of_float32": Kernel(
        INDEXER,
        "index_scores_kernel",
        {"q": "*fp32", "k": "*fp32", "weights": "*fp32", "out": "*fp32"} | numbers("S", "T", "J", "I", "chunk"),
        {"BLOCK_S": FLOAT32.queries, "BLOCK_T": FLOAT32.keys, "BLOCK_J": FLOAT32.heads, "BLOCK_I": FLOAT32.width},
        **LAUNCH,
    ),
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
    "query_gradients": Kernel(
        INDEXER,
        "query_gradients_kernel",
        {"q": "*bf16", "k": "*bf16", "weights": "*fp32", "grad": "*fp32", "grad_q": "*fp32", "grad_weights": "*fp32"}
        | numbers("S", "T", "J", "I"),
        TILE | {"BLOCK_S": 1},
        num_warps=4,
        num_stages=2,
    ),
    "key_gradients": Kernel(
        INDEXER,
        "key_gradients_kernel",
        {"q": "*bf16", "k": "*bf16", "weights": "*fp32", "grad": "*fp32", "grad_k": "*fp32"}
        | numbers("S", "T", "J", "I"),
        TILE | {"BLOCK_S": 2},
        num_warps=8,
        num_stages=2,
    ),
    "top_rows": Kernel(
        INDEXER,
        "top_rows_kernel",
        {"scores": "*fp32", "seen": "*u8", "rows": "*i64"}
        | numbers("S", "T", "K", "scores_b", "scores_s", "seen_b", "seen_s"),
        {"scores_t": 1, "seen_t": 1, "BLOCK": 4096},
        num_warps=8,
    ),
    "target": Kernel(
        "nautile.ops.triton.indexer_loss",
        "target_kernel",
        {"q": "*bf16", "k": "*bf16", "hidden": "*u8", "lse": "*fp32", "p": "*fp32", "scale": "fp32"}
        | numbers("S", "T", "H", "width", "q_s", "q_h", "k_t", "k_h"),
        {"BLOCK_S": 128, "BLOCK_T": 128, "FIRST": 128, "REST": 64},
        num_warps=8,
        num_stages=2,
    ),
}
WITHOUT_WGMMA = ("top_rows_kernel", "index_scores_kernel")


def test_kernels_compile_for_sm90() -> None:
    for report in compile_for_sm90(list(KERNELS.values())):
        report.check(wgmma=report.name not in WITHOUT_WGMMA)


@pytest.mark.parametrize("element_size", [2, 4])
def test_blocks_of_the_target_fit_at_every_width_of_a_head(element_size: int) -> None:
    for width in (16, 64, 128, 192, 256, 384, 512):
        assert 4 * block_for(width, element_size) * width * element_size <= SHARED_LIMIT
    assert (block_for(192, 2), block_for(256, 2), block_for(192, 4)) == (128, 64, 32)
