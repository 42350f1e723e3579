"""Runs Hopper kernels on a CPU: the same .cu file, compiled for the host with hopper_emulator.hpp as its ptx.cuh."""

import ctypes
from pathlib import Path

from nautile.core.cuda_driver import ELEMENT_TYPES, TensorMap
from nautile.core.jit import load_cxx
from nautile.ops.hopper.fp8_plan import SOURCE, Plan

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


def run(plan: Plan, seed: int = 0) -> None:
    """Execute one launch; what the emulator finds fault with is an AssertionError."""
    defines = {"NAUTILE_PTX": f'"{EMULATOR}"', "NAUTILE_KERNEL": f'"{SOURCE}"', **plan.variant.defines()}
    flags = ("-w", "-O1", *(f"-D{name}={value}" for name, value in defines.items()))
    emulate = load_cxx(HERE / "emulated_fp8_gemm.cpp", EMULATOR, SOURCE, flags=flags).emulate
    storage = ctypes.create_string_buffer(4 * 128 + 64)
    first = -ctypes.addressof(storage) % 64
    for i, tensor_map in enumerate(plan.maps):
        ctypes.memmove(ctypes.addressof(storage) + first + 128 * i, ctypes.byref(_emulated(tensor_map)), 128)
    error = ctypes.create_string_buffer(1000)
    how = plan.how
    failed = emulate(
        ctypes.c_void_p(ctypes.addressof(storage) + first),
        ctypes.byref(plan.args),
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
