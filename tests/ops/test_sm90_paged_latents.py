"""Paged decoding as sm_90 code: tensor cores, latents fetched ahead, and nothing spilled where DeepSeek runs."""

import pytest

pytest.importorskip("triton")

from sm90 import SHARED_LIMIT, Kernel, compile_for_sm90

from nautile.ops.latent_layout import PLANES, ROWS, LatentLayout

MODULE = "nautile.ops.triton."


def typed(**names: str) -> dict[str, str]:
    kinds = {"i32s": "*i32", "bf16s": "*bf16", "fp32s": "*fp32", "i32": "i32", "i64": "i64", "fp32": "fp32"}
    return {name: kinds[kind] for kind, group in names.items() for name in group.split()}


def dense(width: int, causal: bool) -> Kernel:
    arguments = typed(
        bf16s="q cache out", i32s="table lengths splits ends", fp32s="lse part part_lse",
        i32="S H G P stride_place stride_group stride_table step_table", i64="stride_page", fp32="scale",
    )  # fmt: skip
    constants = {"X": width, "V": 512, "CAUSAL": causal, "ONE_PAGE": True, "BLOCK_M": 64, "BLOCK_T": 64}
    constants |= {"BLOCK_V": 512, "BLOCK_X": max(16, width - 512)}
    return Kernel(MODULE + "paged_latents", "paged_mla_decode_kernel", arguments, constants, num_warps=8, num_stages=2)


def sparse(layout: LatentLayout, extra: bool) -> Kernel:
    arguments = typed(
        bf16s="q out rope", i32s="splits ends rows counts rows_2 counts_2", fp32s="sink lse part part_lse scales",
        i32="K N P K_2 N_2 P_2 S H V", fp32="scale",
        i64="stride_fp8 stride_scales stride_rope to_fp8 to_scales to_rope stride_fp8_2 stride_scales_2 stride_rope_2",
    )  # fmt: skip
    arguments |= {"fp8": "*fp8e4nv", "scales": "*u8" if layout.planes else "*fp32"}
    row = 576 if layout.planes else 656
    constants = {"HAS_SINK": True, "HAS_EXTRA": extra, "EXPONENTS": layout.planes, "X": layout.width, "F": layout.fp8}
    constants |= {"SCALES": layout.tiles, "FP8_ROW": row, "SCALE_ROW": 8 if layout.planes else row // 4}
    constants |= {"ROPE_ROW": row // 2, "BLOCK_M": 64, "BLOCK_T": 64, "BLOCK_V": 512, "BLOCK_J": 512 // layout.tile}
    name = "paged_sparse_mla_decode_kernel"
    return Kernel(MODULE + "paged_sparse_latents", name, arguments, constants, num_warps=8, num_stages=2)


def test_decoding() -> None:
    reports = compile_for_sm90([dense(576, True), sparse(ROWS, extra=False), sparse(PLANES, extra=True)])
    for report in reports[:2]:
        report.check(wgmma=True)
        assert "cp.async.cg" in report.ptx
    # Placing the rotated part beside the FP8 one costs registers: a few per thread are spilled in each tile.
    assert "wgmma.mma_async" in reports[2].ptx and reports[2].shared <= SHARED_LIMIT and reports[2].spills <= 600


def test_what_goes_before_and_after() -> None:
    merging = typed(fp32s="part part_lse lse sink", i32s="ends", bf16s="out", i32="S H V")
    planning = typed(i32s="lengths table ends", i32="B parts block overhead")
    integers = "N P stride_token step_token row_fp8 row_scales row_rope"
    wide = "stride_fp8 stride_scales stride_rope"
    storing = typed(bf16s="latents rope", i32s="rows", i32=integers, i64=wide, fp32="smallest")
    storing |= {"fp8": "*fp8e4nv", "scales": "*u8"}
    one_page = {name: kind for name, kind in storing.items() if name != "N"}
    layout = {"F": 448, "TILE": 64, "ROPE": 64, "EXPONENTS": True, "BLOCK_J": 8}
    kernels = [
        Kernel(MODULE + "latent_tiles", "merge_kernel", merging, {"HAS_SINK": True, "BLOCK_M": 8, "BLOCK_V": 512}),
        Kernel(MODULE + "split_plan", "plan_splits_kernel", planning, {"BLOCK_B": 128}, num_warps=1),
        Kernel(MODULE + "latent_bytes", "store_latents_kernel", storing, layout, num_warps=1),
        # Triton makes a constant of an integer that is 1: a cache of one page.
        Kernel(MODULE + "latent_bytes", "store_latents_kernel", one_page, {**layout, "N": 1}, num_warps=1),
    ]
    for report in compile_for_sm90(kernels):
        report.check()
