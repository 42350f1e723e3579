"""Powers of two as scales, in registers."""

import triton
import triton.language as tl


@triton.jit
def ceil_to_ue8m0(x):
    """float32: the smallest power of two ≥ x ≥ 0; see `nautile.ops.reference.scale_packing`."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return (tl.minimum(tl.maximum(exponent, 1), 254) << 23).to(tl.float32, bitcast=True)
