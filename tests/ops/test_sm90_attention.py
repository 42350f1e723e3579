"""The attention kernels as sm_90 code at the widths of DeepSeek-V3: heads of 192 and 128, latents of 512 and 64."""

from collections.abc import Callable

import pytest

pytest.importorskip("triton")

from sm90 import Kernel, compile_for_sm90

from nautile.ops.triton.flash import Launch, Widths, forward_launch, keys_launch, queries_launch
from nautile.ops.triton.rows import parts_for, tile_for
from nautile.ops.triton.support import next_power_of_two

Choose = Callable[[Widths, int], Launch]
FLASH = "nautile.ops.triton.flash_"
ROWS = "nautile.ops.triton.rows_"


def arguments(narrow: str, wide: str, integers: str, dtype: str = "bf16") -> dict[str, str]:
    """Argument → type of pointers to `dtype`, pointers to float32, and integers; scales are float32."""
    scales = {"scale": "fp32", "scale_log2": "fp32"}
    types = ((f"*{dtype}", narrow), ("*fp32", wide), ("i32", integers))
    return {name: kind for kind, names in types for name in names.split()} | scales


def flash(
    file: str, name: str, choose: Choose, narrow: str, wide: str,
    Q: int = 192, V: int = 128, dtype: str = "bf16", masked: str = "",
) -> Kernel:  # fmt: skip
    """`masked`: "documents", "selected" or neither."""
    strides = "q_b q_s q_h k_b k_s k_h v_b v_s v_h S H J"
    signature = arguments(f"q_ptr k_ptr v_ptr {narrow}", wide, strides, dtype)
    if name == "attend_forward":
        del signature["scale"]
    widths = Widths.of(Q, V)
    launch = choose(widths, 2 if dtype == "bf16" else 4)
    constants = {"Q": Q, "V": V, "Q_HEAD": widths.head, "Q_TAIL": widths.tail, "V_TILE": widths.value}
    constants |= {"QUERIES": launch.queries, "KEYS": launch.keys}
    constants |= {"DOCUMENTS": masked == "documents", "SELECTED": masked == "selected"}
    bound = "last_ptr" if name == "gradients_of_keys" else "first_ptr"
    given = {"documents": {"ids_ptr": "*i64", bound: "*i32"}, "selected": {"selected_ptr": "*u8"}}.get(masked, {})
    constants |= {pointer: None for pointer in ("ids_ptr", bound, "selected_ptr") if pointer not in given}
    return Kernel(FLASH + file, name, signature | given, constants, launch.num_warps, launch.num_stages)


def training(**case) -> list[Kernel]:
    """Forward and both kernels of the backward."""
    wide = "lse_ptr delta_ptr"
    return [
        flash("forward", "attend_forward", forward_launch, "out_ptr", "lse_ptr", **case),
        flash("backward", "gradients_of_keys", keys_launch, "do_ptr dk_ptr dv_ptr", wide, **case),
        flash("backward", "gradients_of_queries", queries_launch, "do_ptr dq_ptr", wide, **case),
    ]


@pytest.mark.parametrize(
    ("Q", "V", "masked"), [(192, 128, ""), (192, 128, "documents"), (192, 128, "selected"), (128, 128, "documents")]
)
def test_causal_attention(Q: int, V: int, masked: str) -> None:
    for report in compile_for_sm90(training(Q=Q, V=V, masked=masked)):
        report.check(wgmma=True)


def test_causal_attention_of_other_widths_and_types() -> None:
    narrow, wide = (training(Q=64, V=64, dtype=dtype, masked="documents") for dtype in ("bf16", "fp32"))
    odd = [*training(Q=256, V=256), *training(Q=576, V=512), *training(Q=192, V=128, dtype="fp32")]
    for report in compile_for_sm90([*narrow, *wide, *odd]):
        report.check()


def over_rows(C: int, R: int, H: int, dtype: str = "bf16", optional: bool = True) -> list[Kernel]:
    """Forward, gradients of queries, and of rows; `optional`: with lengths and sinks, added atomically."""
    widths = {"C": C, "R": R, "R_TILE": R, "LENGTHS": optional}
    c_tile, size = next_power_of_two(C), 2 if dtype == "bf16" else 4
    given = {"rows_ptr": "*i32"} | ({"length_ptr": "*i32"} if optional else {})

    def kernel(file: str, name: str, narrow: str, wide: str, more: str, constants: dict, warps: int, stages: int):
        strides = f"q_b q_s q_h r_b r_s r_h c_b c_t k_b k_t S H T K {more}"
        signature = arguments(f"q_ptr q_rope_ptr c_ptr k_rope_ptr {narrow}", wide, strides, dtype) | given
        del signature["scale_log2"]
        absent = {} if optional else {"length_ptr": None}
        return Kernel(f"{ROWS}{file}", name, signature, widths | constants | absent, warps, stages)

    forward, backward = (tile_for(H, c_tile, size, turn) for turn in (False, True))
    parts = parts_for(H, c_tile, size)
    constants = {"C_TILE": c_tile, "HEADS": forward.heads, "PLACES": forward.places, "SINK": optional}
    constants |= {} if optional else {"sink_ptr": None}
    wide = "max_ptr lse_ptr" + (" sink_ptr" if optional else "")
    first = kernel("forward", "attend_rows", "out_ptr", wide, "", constants, *forward[2:])
    constants = {"C_TILE": c_tile, "HEADS": backward.heads, "PLACES": backward.places}
    narrow, wide, strides = "do_ptr dq_ptr dq_rope_ptr", "lse_ptr delta_ptr", "dq_n dq_h dr_n dr_h"
    second = kernel("backward", "gradients_of_row_queries", narrow, wide, strides, constants, *backward[2:])
    constants = {"PART": parts.columns, "HEADS": parts.heads, "PLACES": parts.places, "ATOMIC": optional}
    wide, strides = f"{wide} dc_ptr dk_rope_ptr", "dc_b dc_t dk_b dk_t first"
    return [first, second, kernel("backward", "gradients_of_rows", "do_ptr", wide, strides, constants, 8, 2)]


@pytest.mark.parametrize("optional", [True, False])
def test_attention_to_chosen_rows(optional: bool) -> None:
    forward, queries, backward = compile_for_sm90(over_rows(512, 64, 128, optional=optional))
    forward.check(wgmma=True)
    queries.check()  # 32 heads of 512 numbers are too few rows for wgmma: mma.sync
    assert "mma.sync" in queries.ptx
    backward.check(wgmma=True)
    assert ("global.gpu.relaxed.add.v4.f32" in backward.ptx) == optional


@pytest.mark.parametrize(("C", "R", "H"), [(512, 64, 16), (128, 32, 32), (576, 0, 64)])
def test_attention_to_chosen_rows_of_other_widths(C: int, R: int, H: int) -> None:
    """Few heads, the widths of small models, and latents without a rotated part."""
    for report in compile_for_sm90(over_rows(C, R, H)):
        report.check()


def test_attention_to_chosen_rows_in_float32() -> None:
    for report in compile_for_sm90([*over_rows(128, 32, 16, "fp32"), *over_rows(512, 64, 16, "fp32")]):
        report.check()
