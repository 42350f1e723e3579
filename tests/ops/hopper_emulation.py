"""Runs Hopper kernels on a CPU: the same .cu file, compiled for the host with hopper_emulator.hpp as its ptx.cuh."""

import ctypes
from collections.abc import Mapping
from pathlib import Path

from nautile.core.cuda_driver import ELEMENT_TYPES, Launch, TensorMap
from nautile.core.jit import load_cxx
from nautile.ops.hopper import fp8_plan, mla_plan

HERE = Path(__file__).parent
EMULATOR = HERE / "hopper_emulator.hpp"


class EmulatedMap(ctypes.Structure):
    """``TensorMap`` of hopper_emulator.hpp, 128 bytes like the real one."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("dims", ctypes.c_uint64 * 3),
        ("strides", ctypes.c_uint64 * 2),
        ("box", ctypes.c_uint32 * 3),
        ("element_bytes", ctypes.c_uint32),
        ("swizzle", ctypes.c_uint32),
        ("padding", ctypes.c_uint8 * 60),
    )


def run_fp8_gemm(plan: fp8_plan.Plan, seed: int = 0, source: Path = fp8_plan.SOURCE) -> None:
    """Execute one launch of fp8_gemm.cu, or of a changed copy."""
    run(source, fp8_plan.HEADERS, fp8_plan.KERNEL, plan.variant.defines(), plan.maps, plan.args, plan.how, seed)


def run_mla_decode(plan: mla_plan.Plan, seed: int = 0) -> None:
    """Execute both launches of mla_decode.cu."""
    run(mla_plan.SOURCE, mla_plan.HEADERS, mla_plan.KERNEL, {}, plan.maps, plan.args, plan.how, seed)
    run(mla_plan.SOURCE, mla_plan.HEADERS, mla_plan.MERGE, {}, (), plan.args, plan.how_to_merge, seed)


def run(
    source: Path,
    headers: tuple[Path, ...],
    kernel: str,
    defines: Mapping[str, int],
    maps: tuple[TensorMap, ...],
    args: ctypes.Structure,
    how: Launch,
    seed: int,
) -> None:
    """Execute one launch; what the emulator finds fault with is an AssertionError."""
    call = ",".join([*(f"maps[{i}]" for i in range(len(maps))), "*args"])
    macros = {
        "NAUTILE_PTX": f'"{EMULATOR}"',
        "NAUTILE_KERNEL": f'"{source}"',
        "NAUTILE_CALL": f"{kernel}({call})",
        **defines,
    }
    flags = ("-w", "-O1", *(f"-D{name}={value}" for name, value in macros.items()))
    emulate = load_cxx(HERE / "emulated_kernel.cpp", EMULATOR, source, *headers, flags=flags).emulate
    storage = ctypes.create_string_buffer(len(maps) * 128 + 64)
    first = ctypes.addressof(storage) + -ctypes.addressof(storage) % 64
    for i, tensor_map in enumerate(maps):
        ctypes.memmove(first + 128 * i, ctypes.byref(_emulated(tensor_map)), 128)
    error = ctypes.create_string_buffer(1000)
    failed = emulate(
        ctypes.c_void_p(first),
        ctypes.byref(args),
        how.grid,
        how.cluster,
        how.threads,
        how.shared_bytes,
        ctypes.c_uint64(seed),
        error,
        len(error),
    )
    assert not failed, error.value.decode()


def _emulated(of: TensorMap) -> EmulatedMap:
    return EmulatedMap(of.address, of.dims, of.strides, of.box, ELEMENT_TYPES[of.element][1], of.swizzle)
