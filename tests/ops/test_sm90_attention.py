"""The attention kernels as sm_90 code at the widths of DeepSeek-V3: heads of 192 and 128, latents of 512 and 64."""

import pytest

pytest.importorskip("triton")

from sm90 import Kernel, compile_for_sm90

from nautile.ops.triton.flash import Launch, Widths, forward_launch, keys_launch, queries_launch

FLASH = "nautile.ops.triton.flash_"
ROWS = "nautile.ops.triton.rows_"


def arguments(narrow: str, wide: str, integers: str) -> dict[str, str]:
    """Argument → type of pointers to bfloat16, pointers to float32, and integers; scales are float32."""
    scales = {"scale": "fp32", "scale_log2": "fp32"}
    types = (("*bf16", narrow), ("*fp32", wide), ("i32", integers))
    return {name: kind for kind, names in types for name in names.split()} | scales


def flash(file: str, name: str, launch: Launch, narrow: str, wide: str) -> Kernel:
    strides = "q_b q_s q_h k_b k_s k_h v_b v_s v_h S H J"
    signature = arguments(f"q_ptr k_ptr v_ptr {narrow}", wide, strides)
    if name == "attend_forward":
        del signature["scale"]
    constants = {"Q": 192, "V": 128, "Q_HEAD": 128, "Q_TAIL": 64, "V_TILE": 128, "DOCUMENTS": False, "SELECTED": False}
    constants |= {"QUERIES": launch.queries, "KEYS": launch.keys, "ids_ptr": None, "selected_ptr": None}
    constants["last_ptr" if name == "gradients_of_keys" else "first_ptr"] = None
    return Kernel(FLASH + file, name, signature, constants, launch.num_warps, launch.num_stages)


def rows(file: str, name: str, narrow: str, wide: str, more: str, constants: dict) -> Kernel:
    strides = "q_b q_s q_h r_b r_s r_h c_b c_t k_b k_t S H T K"
    signature = arguments(f"q_ptr q_rope_ptr c_ptr k_rope_ptr {narrow}", wide, f"{strides} {more}")
    signature |= {"rows_ptr": "*i32", "length_ptr": "*i32"}
    del signature["scale_log2"]
    return Kernel(ROWS + file, name, signature, {"C": 512, "R": 64, "R_TILE": 64, "LENGTHS": True} | constants, 8, 2)


def test_causal_attention() -> None:
    widths = Widths.of(192, 128)
    forward, keys, queries = (choose(widths, 2) for choose in (forward_launch, keys_launch, queries_launch))
    reports = compile_for_sm90(
        [
            flash("forward", "attend_forward", forward, "out_ptr", "lse_ptr"),
            flash("backward", "gradients_of_keys", keys, "do_ptr dk_ptr dv_ptr", "lse_ptr delta_ptr"),
            flash("backward", "gradients_of_queries", queries, "do_ptr dq_ptr", "lse_ptr delta_ptr"),
        ]
    )
    for report in reports:
        report.check(wgmma=True)


def test_attention_to_chosen_rows() -> None:
    tile = {"C_TILE": 512, "HEADS": 64, "PLACES": 64, "SINK": True}
    forward = rows("forward", "attend_rows", "out_ptr", "sink_ptr max_ptr lse_ptr", "", tile)
    tile = {"C_TILE": 512, "HEADS": 32, "PLACES": 64}
    strides = "dq_n dq_h dr_n dr_h"
    wide = "lse_ptr delta_ptr"
    queries = rows("backward", "gradients_of_row_queries", "do_ptr dq_ptr dq_rope_ptr", wide, strides, tile)
    tile = {"PART": 64, "HEADS": 128, "PLACES": 64, "ATOMIC": True}
    wide, strides = f"{wide} dc_ptr dk_rope_ptr", "dc_b dc_t dk_b dk_t first"
    backward = rows("backward", "gradients_of_rows", "do_ptr", wide, strides, tile)
    forward, queries, backward = compile_for_sm90([forward, queries, backward])
    forward.check(wgmma=True)
    queries.check()  # 32 heads of 512 numbers are too few rows for wgmma: mma.sync
    assert "mma.sync" in queries.ptx
    backward.check(wgmma=True)
    assert "global.gpu.relaxed.add.v4.f32" in backward.ptx
