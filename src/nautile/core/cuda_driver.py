"""The CUDA driver by ctypes: load a cubin, describe tensors to the copy engine, launch. Nothing to build or install.

torch owns contexts, streams and memory; `bind` makes its context current in threads that have none yet. Names and
numbers are those of cuda.h, which keeps them from release to release.
"""

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from nautile.core.errors import NautileError

ELEMENT_TYPES = {"uint8": (0, 1), "bfloat16": (9, 2)}
"""Type of a map's elements → (CUtensorMapDataType, bytes). FP8 is copied as uint8."""
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
"""Bytes of a swizzled row in shared memory → CUtensorMapSwizzle."""
L2_PROMOTION_256B = 3
MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
CLUSTER_DIMENSION = 4
"""CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION."""


class DriverError(NautileError):
    """The CUDA driver refused a call. Exit code 1."""


@dataclass(frozen=True)
class TensorMap:
    """A tensor of three dimensions, innermost first, and the box of it that one copy moves."""

    address: int
    """Of the first element; a multiple of 16."""
    element: str
    """A key of `ELEMENT_TYPES`."""
    dims: tuple[int, int, int]
    strides: tuple[int, int]
    """Bytes from one row, and from one matrix, to the next: multiples of 16."""
    box: tuple[int, int, int]
    swizzle: int
    """Bytes of a row of the box if it is spread over banks, else 0."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is started."""

    grid: int
    threads: int
    cluster: int
    shared_bytes: int


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_uint * 16),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


def bind(device: int) -> None:
    """Make the primary context of a device current if this thread has none, as one that has not called CUDA yet.

    torch's memory and streams may come from a cache, without a call that would do it.
    """
    context, handle = ctypes.c_void_p(), ctypes.c_int()
    _call("cuCtxGetCurrent", ctypes.byref(context))
    if context.value is None:
        _call("cuDeviceGet", ctypes.byref(handle), device)
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        _call("cuCtxSetCurrent", context)


class Kernel:
    """One function of one cubin, loaded into the current context."""

    def __init__(self, cubin: Path, name: str, shared_bytes: int) -> None:
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._image = cubin.read_bytes()
        _call("cuModuleLoadData", ctypes.byref(module), self._image)
        _call("cuModuleGetFunction", ctypes.byref(self._function), module, name.encode())
        _call("cuFuncSetAttribute", self._function, MAX_DYNAMIC_SHARED, shared_bytes)

    def launch(self, how: Launch, stream: int, arguments: Sequence[ctypes.Structure | ctypes.Array]) -> None:
        """Start it on `stream` (a CUstream as torch gives it); `arguments` are copied before this returns."""
        attribute = _Attribute(CLUSTER_DIMENSION, 0, (how.cluster, 1, 1))
        config = _Config((how.grid, 1, 1), (how.threads, 1, 1), how.shared_bytes, stream, ctypes.pointer(attribute), 1)
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        _call("cuLaunchKernelEx", ctypes.byref(config), self._function, addresses, None)


@lru_cache(maxsize=4096)
def encode(tensor_map: TensorMap) -> ctypes.Array:
    """The 128 bytes that a kernel takes by value. They depend on nothing but the numbers given, so they are kept."""
    kind, size = ELEMENT_TYPES[tensor_map.element]
    assert tensor_map.address % 16 == 0, tensor_map
    assert all(stride % 16 == 0 for stride in tensor_map.strides), tensor_map
    assert all(0 < box <= 256 for box in tensor_map.box), tensor_map
    assert not tensor_map.swizzle or tensor_map.box[0] * size <= tensor_map.swizzle, tensor_map
    buffer = (ctypes.c_uint64 * 32)()
    # cuda.h wants 128-byte alignment since CUDA 13 (64 before), ctypes promises 8.
    place = (ctypes.c_uint64 * 16).from_buffer(buffer, -ctypes.addressof(buffer) % 128)
    _call(
        "cuTensorMapEncodeTiled",
        ctypes.byref(place),
        kind,
        3,
        ctypes.c_void_p(tensor_map.address),
        (ctypes.c_uint64 * 3)(*tensor_map.dims),
        (ctypes.c_uint64 * 2)(*tensor_map.strides),
        (ctypes.c_uint32 * 3)(*tensor_map.box),
        (ctypes.c_uint32 * 3)(1, 1, 1),
        0,
        SWIZZLES[tensor_map.swizzle],
        L2_PROMOTION_256B,
        0,
    )
    return place


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    driver = _driver()
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise DriverError(
            f"{name} failed with CUDA error {code}",
            (text.value or b"unknown error").decode(),
            "NAUTILE_OPS=triton or NAUTILE_OPS=reference runs without this kernel",
        )
