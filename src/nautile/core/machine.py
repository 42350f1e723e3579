"""This machine: what it is, and how fast its arithmetic and its memory really are.

The measured peaks are what the report and the benchmarks divide by, so they are taken the way a model would meet them:
through torch, with the threads that torch is set to.
"""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "triton")
"""Libraries whose versions decide what a run computes."""

_GEMM_SIZES = (512, 1024, 2048)
_READ_BYTES = 256 * 2**20
"""Far more than any last-level cache, so that reads come from memory."""


def describe() -> dict[str, Any]:
    """Processor, cores, memory in bytes, system and versions, as plain JSON values."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": bf16_instructions(),
        "memory_bytes": memory_bytes(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Version of nautile and of each library in `LIBRARIES` that is installed."""
    found = {}
    for name in ("nautile", *LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """The processor's name as its maker writes it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use, which in a container or under taskset are fewer than the machine has."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cores()
    return allowed if quota is None else max(1, min(allowed, round(quota)))


def memory_bytes() -> int:
    """Memory this process may use."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if sys.platform != "win32" else 0
    limit = _read(Path("/sys/fs/cgroup/memory.max"))
    return min(physical, int(limit)) if limit.isdigit() else physical


def free_disk_bytes(path: Path) -> int:
    """Free space on the disk that holds `path` or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def bf16_instructions() -> list[str]:
    """The instruction sets of this processor that multiply bfloat16 natively; without one, bf16 is emulated."""
    flags = cpu_features().split()
    return [name for name in ("amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16") if name in flags]


def cpu_features() -> str:
    """The instruction sets of this processor, as the system names them, with spaces between."""
    return _cpuinfo("flags") or _cpuinfo("Features") or platform.processor()


def measure_gemm_peak(dtype: "torch.dtype | str" = "float32", seconds: float = 0.5) -> float:
    """Fastest square matrix product found within `seconds`, in GFLOP/s (one multiply-add = 2 FLOP).

    Args:
        dtype: type of both factors, a torch dtype or its name.
        seconds: how long to measure; the best single product counts, since what disturbs it only makes it slower.
    """
    import torch

    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    best = 0.0
    for size in _GEMM_SIZES:
        a, b = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
        product = torch.empty(size, size, dtype=kind)
        shortest = _shortest(lambda a=a, b=b, out=product: torch.mm(a, b, out=out), seconds / len(_GEMM_SIZES))
        best = max(best, 2 * size**3 / shortest / 1e9)
    return best


def measure_read_bandwidth(seconds: float = 0.5) -> float:
    """Fastest read of a block much larger than the caches, in GB/s (1e9 bytes)."""
    import torch

    block = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / _shortest(lambda: block.sum(), seconds) / 1e9


def _shortest(work: Callable[[], object], seconds: float) -> float:
    work()  # page in, pick kernels
    shortest, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        shortest = min(shortest, now - start)
        if now >= end:
            return shortest


def _cgroup_cores() -> float | None:
    quota, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    return int(quota) / int(period) if quota.isdigit() else None


def _cpuinfo(key: str) -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    """The text of a kernel file that only Linux has; empty elsewhere."""
    return path.read_text().strip() if path.exists() else ""
