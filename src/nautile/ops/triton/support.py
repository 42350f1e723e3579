"""What every Triton kernel here may assume, and how to write one that also runs in the interpreter.

- ``@triton.jit`` alone: tile sizes are chosen by plain functions, since autotuning needs a device.
- Arithmetic in float32. Outside ``tl.dot``, casts, loads and stores, the interpreter has no bfloat16 or FP8 numbers.
- Offsets that can pass 2³¹ elements start from an int64.
"""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def floats(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels for float32, bfloat16 and float16 cannot take `dtype`; None if they can."""
    return None if dtype in FLOATS else f"{dtype} is not one of float32, bfloat16, float16"


def fp8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels for float8_e4m3fn operands cannot take `dtype` on `device`; None if they can."""
    if dtype != torch.float8_e4m3fn:
        return f"{dtype} is not float8_e4m3fn"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "FP8 products need compute capability 8.9 or later"
    return None


def next_power_of_two(n: int) -> int:
    """Smallest power of two ≥ n; tiles are powers of two."""
    return 1 << max(0, n - 1).bit_length()
