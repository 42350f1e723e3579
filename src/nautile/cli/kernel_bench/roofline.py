"""The machine's own limits, measured beside the kernels: how fast it multiplies, and how fast it reads."""

from dataclasses import dataclass

import torch

from nautile.cli.kernel_bench.timing import Timer
from nautile.core import machine

_READ_BYTES = 1 << 30
"""Read on a GPU: twenty times an H100's second-level cache."""
_GEMM = 8192
"""Rows, columns and depth of the product that peaks on a GPU are taken from."""


@dataclass(frozen=True)
class Roofline:
    """What no kernel can pass on this machine; products not listed multiply in float32."""

    bytes_per_second: float
    flops_per_second: dict[str, float]
    """Type of the factors, as torch names it without ``torch.`` → FLOP/s (a multiply-add is 2)."""

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """Shortest time for so many FLOP and bytes, if one hides behind the other."""
        peak = self.flops_per_second.get(dtype, self.flops_per_second["float32"])
        return max(flops / peak, moved / self.bytes_per_second)


def measure(device: torch.device, seconds: float) -> Roofline:
    """Limits of `device`; each figure takes about `seconds`."""
    if device.type == "cpu":
        peaks = {dtype: machine.measure_gemm_peak(dtype, seconds) * 1e9 for dtype in ("float32", "bfloat16")}
        return Roofline(machine.measure_read_bandwidth(seconds) * 1e9, peaks)
    timer = Timer(device, seconds)
    block = torch.empty(_READ_BYTES // 4, device=device).normal_()
    read = timer.median(block.sum)
    factors = [torch.randn(_GEMM, _GEMM, device=device) for _ in range(2)]
    flops = 2 * _GEMM**3
    peaks = {"float32": flops / timer.median(lambda: factors[0] @ factors[1])}
    a, b = (x.bfloat16() for x in factors)
    peaks["bfloat16"] = flops / timer.median(lambda: a @ b.t())
    if torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        left, right = (x.to(torch.float8_e4m3fn) for x in factors)
        peaks["float8_e4m3fn"] = flops / timer.median(
            lambda: torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16)
        )
    return Roofline(_READ_BYTES / read, peaks)
