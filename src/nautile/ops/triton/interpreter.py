"""Repairs of Triton's CPU interpreter, which is silently wrong for bfloat16 and FP8.

As of Triton 3.6 to 3.9 it multiplies the bit patterns of bfloat16 numbers in ``tl.dot``, truncates float32 →
bfloat16 instead of rounding, loses mantissa carries in float32 → e4m3, wraps instead of saturating, and reads FP8 NaN
as a number.
Here conversions go through torch, products through float32, and other arithmetic on such numbers, which would combine
their bit patterns, raises instead.
"""

from functools import cache
from typing import Any

import numpy as np
import torch

from nautile.ops.fp8_tensor import LARGEST


@cache
def repair() -> None:
    """Install the repairs, once per process. Has no effect on compiled kernels."""
    import triton.language as tl
    from triton.runtime import interpreter

    narrow = {
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
        tl.float8e4b8: torch.float8_e4m3fnuz,
    }
    plain = {tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}
    handle, numpy_type = interpreter.TensorHandle, interpreter._get_np_dtype

    def to_torch(bits: np.ndarray, dtype: Any) -> torch.Tensor:
        flat = torch.from_numpy(bits.reshape(-1).copy())
        return flat.view(narrow[dtype]) if dtype in narrow else flat

    def to_bits(x: torch.Tensor, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        if dtype in (tl.float8e4nv, tl.float8e4b8):  # cvt.rn.satfinite
            x = x.float().clamp(-LARGEST, LARGEST)
        if dtype not in narrow:
            return x.to(plain[dtype]).numpy().reshape(shape)
        width = torch.uint16 if dtype == tl.bfloat16 else torch.uint8
        return x.to(narrow[dtype]).view(width).numpy().reshape(shape)

    def convert(data: np.ndarray, source: Any, target: Any) -> np.ndarray:
        wide = to_torch(data, source)
        return to_bits(wide.double() if source == tl.float64 else wide.float(), target, data.shape)

    floats = {*narrow, *plain}
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        a, b = src.dtype.scalar, dst_type.scalar
        if a not in narrow and b not in narrow:
            return cast(self, src, dst_type)
        if a in floats and b in floats:
            return handle(convert(src.data, a, b), b)
        if a in narrow:  # to an integer
            return handle(convert(src.data, a, tl.float32).astype(numpy_type(dst_type)), b)
        return handle(to_bits(torch.from_numpy(src.data.astype(np.float32)), b, src.data.shape), b)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if rounding_mode is not None and rounding_mode != interpreter._ir.ROUNDING_MODE.RTNE:
            raise NotImplementedError(f"the interpreter rounds to nearest even only, not {rounding_mode}")
        return handle(convert(src.data, src.dtype.scalar, dst_type.scalar), dst_type.scalar)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        left, right = (
            convert(x.data, x.dtype.scalar, tl.float32) if x.dtype.scalar in narrow else x.data for x in (a, b)
        )
        return handle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    binary = interpreter.InterpreterBuilder.binary_op
    of_bits = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar in narrow and op not in of_bits:
            raise TypeError(f"{op.__name__} of {lhs.dtype.scalar}: the interpreter needs .to(tl.float32) first")
        return binary(self, lhs, rhs, op)

    builder = interpreter.InterpreterBuilder
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.create_dot, builder.binary_op = create_dot, binary_op
