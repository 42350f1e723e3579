"""The product kernels as sm_90 code: FP8 and bfloat16 on wgmma, tiles within an SM, no spills."""

import pytest

pytest.importorskip("triton")

from sm90 import Kernel, compile_for_sm90

FP8 = "nautile.ops.triton.fp8_products"
PLAIN = "nautile.ops.triton.grouped_products"
SCALED = {"a": "*fp8e4nv", "a_scale": "*fp32", "b": "*fp8e4nv", "b_scale": "*fp32"}
TILE = {"BLOCK_M": 128, "BLOCK_N": 128}
K_LAST = {"a_k": 1, "b_k": 1, "out_n": 1}


def numbers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


STRIDES = "a_g a_m sa_g sa_m sa_k b_g b_n sb_g sb_n sb_k c_g c_m c_n out_g out_m"
KERNELS = {
    "dense": Kernel(
        FP8,
        "fp8_product_kernel",
        SCALED | {"c": "*bf16", "out": "*bf16", "layout": "*fp32"} | numbers("M N K " + STRIDES),
        TILE | K_LAST | {"MODE": 0, "B_ROWS": 128, "HAS_C": False},
        num_warps=8,
    ),
    "grouped": Kernel(
        FP8,
        "fp8_product_kernel",
        SCALED | {"c": "*bf16", "out": "*bf16", "layout": "*i32"} | numbers("M N K " + STRIDES),
        TILE | K_LAST | {"MODE": 1, "B_ROWS": 128, "HAS_C": False},
        num_warps=8,
    ),
    "k_grouped": Kernel(
        FP8,
        "k_grouped_fp8_kernel",
        SCALED
        | {"c": "*fp32", "out": "*fp32", "ends": "*i32"}
        | numbers("M N alignment a_m sa_m sa_k b_n sb_n sb_k c_g c_m c_n out_g out_m"),
        TILE | K_LAST | {"HAS_C": True, "BLOCK_N": 64},
        num_warps=8,
    ),
    "grouped bf16": Kernel(
        PLAIN,
        "grouped_product_kernel",
        {"a": "*bf16", "b": "*bf16", "out": "*bf16", "layout": "*i32"} | numbers("M N K a_g a_m b_g b_n out_g out_m"),
        TILE | K_LAST | {"MODE": 1, "BLOCK_K": 64},
        num_warps=8,
    ),
    "k_grouped bf16": Kernel(
        PLAIN,
        "k_grouped_product_kernel",
        {"a": "*bf16", "b": "*bf16", "c": "*fp32", "out": "*fp32", "ends": "*i32"}
        | numbers("M N alignment a_k b_k c_g c_m c_n out_g out_m"),
        TILE | {"a_m": 1, "b_n": 1, "out_n": 1, "HAS_C": True, "BLOCK_K": 64},
        num_warps=8,
    ),
}


@pytest.fixture(scope="module")
def reports():
    return dict(zip(KERNELS, compile_for_sm90(list(KERNELS.values())), strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_sm90(name, reports):
    report = reports[name]
    report.check(wgmma=True)
    assert ("bf16.bf16" if "bf16" in name else "e4m3.e4m3") in report.ptx
