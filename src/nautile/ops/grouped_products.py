"""Matrix products of several groups at once in bfloat16 or float32: the twins of the grouped ones in `fp8_products`.

Groups lie in memory as `group_layout` says. Products are accumulated in float32, of float64 in float64, and rounded
once. None of this has a gradient. M rows, N columns, K summed over, G groups.
"""

import torch
from torch import Tensor

from nautile.ops import group_layout
from nautile.ops.checks import same_device
from nautile.ops.dispatch import implementation
from nautile.ops.fp8_products import check_counts, checked_ends, checked_rows

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch.no_grad()
def grouped_gemm(
    a_MK: Tensor,
    b_GNK: Tensor,
    layout: Tensor,
    out_MN: Tensor | None = None,
    *,
    psum: bool = False,
    alignment: int = group_layout.ALIGNMENT,
) -> Tensor:
    """Rows of several groups in one matrix, each times the factor of its group: ``D_m = A_m · B_gᵀ``, g = layout_m.

    Args:
        a_MK: Padding rows may hold anything.
        b_GNK: Of the dtype of `a_MK`, any strides.
        layout: int32: group of each row [M], −1 for padding; with `psum` the groups' ends [G].
        out_MN: Written and returned; of the operands' dtype or float32.
        psum: What `layout` is.
        alignment: Every group begins at a multiple of so many rows, itself a multiple of 16.

    Returns:
        [M, N]; 0 in padding rows.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together; a group that does not exist or begins elsewhere.
    """
    op = "grouped_gemm"
    _check(op, a_MK, b_GNK, "[M, K]", "[G, N, K]")
    if a_MK.shape[1] != b_GNK.shape[2]:
        raise ValueError(f"{op}: K of a {list(a_MK.shape)} is not that of b {list(b_GNK.shape)}")
    (M, _), (G, N, _) = a_MK.shape, b_GNK.shape
    same_device(op, a=a_MK, b=b_GNK, layout=layout, out=out_MN)
    groups_M = checked_rows(op, layout, M, G, psum, alignment)
    out_MN = _result(op, out_MN, (M, N), a_MK)
    return implementation(op, a_MK)(a_MK, b_GNK, groups_M, layout if psum else None, out_MN, alignment)


@torch.no_grad()
def masked_gemm(a_GMK: Tensor, b_GNK: Tensor, counts_G: Tensor, out_GMN: Tensor | None = None) -> Tensor:
    """One product per group, of which only the first rows are wanted: ``D_gm = A_gm · B_gᵀ`` for m < counts_g.

    Args:
        a_GMK: Rows from counts_g on may hold anything.
        b_GNK: Of the same dtype.
        counts_G: int32 in [0, M].
        out_GMN: Written and returned; of the operands' dtype or float32.

    Returns:
        [G, M, N]; rows from counts_g on are not written, so in a new tensor they are whatever memory held.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together; counts beyond M.
    """
    op = "masked_gemm"
    _check(op, a_GMK, b_GNK, "[G, M, K]", "[G, N, K]")
    if a_GMK.shape[0] != b_GNK.shape[0] or a_GMK.shape[2] != b_GNK.shape[2]:
        raise ValueError(f"{op}: G or K of a {list(a_GMK.shape)} is not that of b {list(b_GNK.shape)}")
    (G, M, _), N = a_GMK.shape, b_GNK.shape[1]
    same_device(op, a=a_GMK, b=b_GNK, counts=counts_G, out=out_GMN)
    check_counts(op, counts_G, G, M)
    out_GMN = _result(op, out_GMN, (G, M, N), a_GMK)
    return implementation(op, a_GMK)(a_GMK, b_GNK, counts_G, out_GMN)


@torch.no_grad()
def k_grouped_gemm(
    a_KM: Tensor,
    b_KN: Tensor,
    ends_G: Tensor,
    c_GMN: Tensor | None = None,
    out_GMN: Tensor | None = None,
    *,
    alignment: int = group_layout.ALIGNMENT,
) -> Tensor:
    """One product per stretch of K: ``D_g = C_g + Σ_{k in group g} A_kᵀ · B_k``, the gradient of a stack of weights.

    Args:
        a_KM: Rows in aligned segments; padding rows may hold anything.
        b_KN: Of the same dtype, in the same segments.
        ends_G: int32: where each group's rows end.
        c_GMN: What to add, of the result's dtype; may be `out_GMN` itself.
        out_GMN: Written and returned; of the operands' dtype or float32, which a new one is (float64 of float64).
        alignment: Every group begins at a multiple of so many rows, itself a multiple of 16.

    Returns:
        [G, M, N]; C, or 0, for a group without rows.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together; ends that do not follow one another within K.
    """
    op = "k_grouped_gemm"
    _check(op, a_KM, b_KN, "[K, M]", "[K, N]")
    if a_KM.shape[0] != b_KN.shape[0]:
        raise ValueError(f"{op}: K of a {list(a_KM.shape)} is not that of b {list(b_KN.shape)}")
    (K, M), N = a_KM.shape, b_KN.shape[1]
    same_device(op, a=a_KM, b=b_KN, ends=ends_G, c=c_GMN, out=out_GMN)
    G = checked_ends(op, ends_G, K, alignment, 16)
    if out_GMN is None:
        dtype = c_GMN.dtype if c_GMN is not None else torch.promote_types(a_KM.dtype, torch.float32)
        out_GMN = a_KM.new_empty((G, M, N), dtype=dtype)
    out_GMN = _result(op, out_GMN, (G, M, N), a_KM)
    if c_GMN is not None and (c_GMN.shape != out_GMN.shape or c_GMN.dtype != out_GMN.dtype):
        raise ValueError(f"{op}: c must be {out_GMN.dtype} {[G, M, N]}, got {c_GMN.dtype} {list(c_GMN.shape)}")
    return implementation(op, a_KM)(a_KM, b_KN, ends_G, c_GMN, out_GMN, alignment)


def _check(op: str, a: Tensor, b: Tensor, a_shape: str, b_shape: str) -> None:
    if a.dim() != len(a_shape.split(",")) or b.dim() != len(b_shape.split(",")):
        raise ValueError(f"{op}: want a {a_shape} and b {b_shape}, got {list(a.shape)} and {list(b.shape)}")
    if a.dtype not in FLOATS or a.dtype != b.dtype:
        raise ValueError(f"{op}: a and b must be of one dtype out of {FLOATS}, got {a.dtype} and {b.dtype}")


def _result(op: str, out: Tensor | None, shape: tuple[int, ...], a: Tensor) -> Tensor:
    if out is None:
        return a.new_empty(shape)
    allowed = {a.dtype, torch.promote_types(a.dtype, torch.float32)}
    if out.shape != shape or out.dtype not in allowed:
        names = " or ".join(sorted(map(str, allowed)))
        raise ValueError(f"{op}: out must be {names} {list(shape)}, got {out.dtype} {list(out.shape)}")
    return out
