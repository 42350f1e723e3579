"""The ctypes side of the CUDA driver, against a driver that records, and against cuda.h where nvcc is."""

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nautile.core import cuda_driver
from nautile.core.cuda_driver import DriverError, Kernel, Launch, TensorMap, bind, encode
from nautile.core.jit import why_no_nvcc

MAP = TensorMap(4096, "bfloat16", (576, 64, 7), (1280, 81920), (64, 64, 1), 128)


class Driver:
    """Records the calls; fails those of one name."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[tuple[str, tuple]] = []
        self.failing = failing

    def __getattr__(self, name: str):
        def call(*arguments: object) -> int:
            self.calls.append((name, arguments))
            if name == "cuGetErrorString":
                text = arguments[1]._obj  # pyrefly: ignore
                text.value = b"out of luck"
                return 0
            return 700 if name == self.failing else 0

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: fake)
    encode.cache_clear()
    yield fake
    encode.cache_clear()


def test_a_map_is_encoded_once_and_aligned(driver: Driver) -> None:
    first = encode(MAP)
    assert encode(MAP) is first
    assert ctypes.addressof(first) % 128 == 0 and ctypes.sizeof(first) == 128
    ((name, given),) = driver.calls
    assert name == "cuTensorMapEncodeTiled"
    _, kind, rank, address, dims, strides, box, steps, interleave, swizzle, _, fill = given
    assert (kind, rank, address.value) == (9, 3, 4096)
    assert (list(dims), list(strides), list(box)) == ([576, 64, 7], [1280, 81920], [64, 64, 1])
    assert (list(steps), interleave, swizzle, fill) == ([1, 1, 1], 0, 3, 0)


def test_a_thread_without_a_context_gets_the_devices_own(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    bind(1)
    names = [name for name, _ in driver.calls]
    assert names == ["cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert driver.calls[1][1][1] == 1
    driver.calls.clear()

    def current(context) -> int:
        context._obj.value = 4096
        return 0

    monkeypatch.setattr(driver, "cuCtxGetCurrent", current, raising=False)
    bind(1)
    assert driver.calls == []


def test_a_launch_passes_addresses_of_its_arguments(driver: Driver, tmp_path: Path) -> None:
    cubin = tmp_path / "x.cubin"
    cubin.write_bytes(b"cubin")
    kernel = Kernel(cubin, "f", 200_000)
    assert [name for name, _ in driver.calls] == ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"]
    assert driver.calls[1][1][2] == b"f" and driver.calls[2][1][1:] == (8, 200_000)
    arguments = ((ctypes.c_int * 2)(5, 6), (ctypes.c_int * 1)(7))
    kernel.launch(Launch(grid=12, threads=384, cluster=2, shared_bytes=99), 1234, arguments)
    name, (reference, _, addresses, extra) = driver.calls[-1]
    config = reference._obj
    assert (name, extra) == ("cuLaunchKernelEx", None)
    assert (list(config.grid), list(config.block)) == ([12, 1, 1], [384, 1, 1])
    assert (config.shared_bytes, config.stream, config.attribute_count) == (99, 1234, 1)
    assert (config.attributes[0].id, list(config.attributes[0].value[:3])) == (4, [2, 1, 1])
    assert list(addresses) == [ctypes.addressof(x) for x in arguments]


def test_a_refusal_is_told_with_the_drivers_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_driver, "_driver", lambda: Driver(failing="cuModuleLoadData"))
    (tmp_path / "x.cubin").write_bytes(b"")
    with pytest.raises(DriverError, match="cuModuleLoadData failed with CUDA error 700") as caught:
        Kernel(tmp_path / "x.cubin", "f", 0)
    assert "out of luck" in caught.value.why


@pytest.mark.skipif(why_no_nvcc() is not None, reason=str(why_no_nvcc()))
def test_structures_and_numbers_are_those_of_cuda_h(tmp_path: Path) -> None:
    config, attribute = cuda_driver._Config, cuda_driver._Attribute
    facts = {
        "sizeof(CUlaunchConfig)": ctypes.sizeof(config),
        "offsetof(CUlaunchConfig, blockDimX)": config.block.offset,
        "offsetof(CUlaunchConfig, sharedMemBytes)": config.shared_bytes.offset,
        "offsetof(CUlaunchConfig, hStream)": config.stream.offset,
        "offsetof(CUlaunchConfig, attrs)": config.attributes.offset,
        "offsetof(CUlaunchConfig, numAttrs)": config.attribute_count.offset,
        "sizeof(CUlaunchAttribute)": ctypes.sizeof(attribute),
        "offsetof(CUlaunchAttribute, value)": attribute.value.offset,
        "sizeof(CUtensorMap)": 128,
        "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION": cuda_driver.CLUSTER_DIMENSION,
        "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": cuda_driver.MAX_DYNAMIC_SHARED,
        "CU_TENSOR_MAP_DATA_TYPE_UINT8": cuda_driver.ELEMENT_TYPES["uint8"][0],
        "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16": cuda_driver.ELEMENT_TYPES["bfloat16"][0],
        "CU_TENSOR_MAP_SWIZZLE_32B": cuda_driver.SWIZZLES[32],
        "CU_TENSOR_MAP_SWIZZLE_64B": cuda_driver.SWIZZLES[64],
        "CU_TENSOR_MAP_SWIZZLE_128B": cuda_driver.SWIZZLES[128],
        "CU_TENSOR_MAP_L2_PROMOTION_L2_256B": cuda_driver.L2_PROMOTION_256B,
    }
    lines = ["#include <cuda.h>", "#include <cstddef>"]
    lines += [f'static_assert(int({fact}) == {value}, "{fact}");' for fact, value in facts.items()]
    lines += ["static_assert(128 % alignof(CUtensorMap) == 0);"]
    source = tmp_path / "facts.cu"
    source.write_text("\n".join(lines))
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", str(source), "-o", str(tmp_path / "x")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
