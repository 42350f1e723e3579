"""Matrix products of FP8 numbers with block scales: ``D = C + A·Bᵀ``, dense and in three kinds of groups.

    D_mn = C_mn + Σ_j (Σ_{k in block j} a_mk · b_nk) · s_mj · t_nj

Blocks j are 128 long. Tensor cores add FP8 products with about 14 bits (DeepSeek-V3, arXiv 2412.19437, §3.3.2), so
every block's sum is promoted: scaled and added to float32 outside of them.

Operands are K-last, as the published weights are ("nt" elsewhere): A [M, K], B [N, K]; `Fp8Tensor.t()` turns one that
is not. Groups lie in memory as `group_layout` says. None of this has a gradient; `nautile.ops.fp8_linear` has. M, N, K
as above, G groups.
"""

import torch
from torch import Tensor

from nautile.ops import group_layout
from nautile.ops.checks import looks_at_values, same_device
from nautile.ops.dispatch import implementation
from nautile.ops.fp8_tensor import Fp8Tensor

BLOCK_K = 128
"""Length of the blocks of K that share a scale."""
ROWS = (1, BLOCK_K)
SQUARES = (BLOCK_K, BLOCK_K)


@torch.no_grad()
def fp8_gemm(
    a: Fp8Tensor,
    b: Fp8Tensor,
    c_MN: Tensor | None = None,
    out_MN: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``C + A·Bᵀ``, accumulated in float32 and rounded once.

    Args:
        a: [M, K] in blocks (1, 128), any strides.
        b: [N, K] in blocks (128, 128), a weight, or (1, 128), the other factor of a weight's gradient.
        c_MN: What to add, of the result's dtype; may be `out_MN` itself.
        out_MN: Written and returned; a new tensor otherwise.
        dtype: bfloat16 or float32; by default that of `out_MN`, else of `c_MN`, else bfloat16.

    Returns:
        [M, N].

    Raises:
        ValueError: Shapes, blocks, dtypes or devices do not fit together; K is no multiple of 128; a scale is not
            finite.
    """
    M, N, _ = _shapes("fp8_gemm", a, b, 2, 2)
    dtype = _dtype("fp8_gemm", dtype, out_MN, c_MN)
    same_device("fp8_gemm", a=a.data, b=b.data, c=c_MN, out=out_MN)
    _operand("fp8_gemm", "c", c_MN, (M, N), dtype)
    _finite("fp8_gemm", a=a.scale, b=b.scale)
    out_MN = _result("fp8_gemm", out_MN, (M, N), dtype, a.device)
    return implementation("fp8_gemm", a.data)(a, b, c_MN, out_MN)


@torch.no_grad()
def grouped_fp8_gemm(
    a: Fp8Tensor,
    b: Fp8Tensor,
    layout: Tensor,
    out_MN: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    psum: bool = False,
    alignment: int = group_layout.ALIGNMENT,
) -> Tensor:
    """Rows of several groups in one matrix, each times the factor of its group: ``D_m = A_m · B_gᵀ``, g = layout_m.

    Args:
        a: [M, K] in blocks (1, 128). Padding rows may hold anything.
        b: [G, N, K] in blocks (128, 128).
        layout: int32: group of each row [M], −1 for padding; with `psum` the groups' ends [G].
        out_MN: Written and returned.
        dtype: bfloat16 or float32; by default that of `out_MN`, else bfloat16.
        psum: What `layout` is.
        alignment: Every group begins at a multiple of so many rows, itself a multiple of 16.

    Returns:
        [M, N]; 0 in padding rows.

    Raises:
        ValueError: As `fp8_gemm`; a group that does not exist or begins elsewhere.
    """
    op = "grouped_fp8_gemm"
    M, N, G = _shapes(op, a, b, 2, 3)
    dtype = _dtype(op, dtype, out_MN)
    same_device(op, a=a.data, b=b.data, layout=layout, out=out_MN)
    groups_M = checked_rows(op, layout, M, G, psum, alignment)
    if looks_at_values(a.data):
        _finite(op, a=a.scale[groups_M >= 0], b=b.scale)
    out_MN = _result(op, out_MN, (M, N), dtype, a.device)
    return implementation(op, a.data)(a, b, groups_M, out_MN, alignment)


@torch.no_grad()
def masked_fp8_gemm(
    a: Fp8Tensor,
    b: Fp8Tensor,
    counts_G: Tensor,
    out_GMN: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One product per group, of which only the first rows are wanted: ``D_gm = A_gm · B_gᵀ`` for m < counts_g.

    For decoding with CUDA graphs: shapes stay, counts change.

    Args:
        a: [G, M, K] in blocks (1, 128). Rows from counts_g on may hold anything.
        b: [G, N, K] in blocks (128, 128).
        counts_G: int32 in [0, M].
        out_GMN: Written and returned.
        dtype: bfloat16 or float32; by default that of `out_GMN`, else bfloat16.

    Returns:
        [G, M, N]; rows from counts_g on are not written, so in a new tensor they are whatever memory held.

    Raises:
        ValueError: As `fp8_gemm`; counts beyond M.
    """
    op = "masked_fp8_gemm"
    M, N, G = _shapes(op, a, b, 3, 3)
    dtype = _dtype(op, dtype, out_GMN)
    same_device(op, a=a.data, b=b.data, counts=counts_G, out=out_GMN)
    check_counts(op, counts_G, G, M)
    if looks_at_values(a.data):
        used_GM = torch.arange(M, device=a.device) < counts_G[:, None]
        _finite(op, a=a.scale[used_GM], b=b.scale)
    out_GMN = _result(op, out_GMN, (G, M, N), dtype, a.device)
    return implementation(op, a.data)(a, b, counts_G, out_GMN)


@torch.no_grad()
def k_grouped_fp8_gemm(
    a: Fp8Tensor,
    b: Fp8Tensor,
    ends_G: Tensor,
    c_GMN: Tensor | None = None,
    out_GMN: Tensor | None = None,
    *,
    alignment: int = group_layout.ALIGNMENT,
) -> Tensor:
    """One product per stretch of K: ``D_g = C_g + Σ_{k in group g} A_·k · B_·kᵀ``, the gradient of a stack of weights.

    Args:
        a: [M, K] in blocks (1, 128).
        b: [N, K] in blocks (1, 128).
        ends_G: int32: where each group's columns end. Padding columns count as 0 whatever they hold.
        c_GMN: float32, what to add; may be `out_GMN` itself.
        out_GMN: float32, written and returned.
        alignment: Every group begins at a multiple of so many columns, itself a multiple of 128.

    Returns:
        float32 [G, M, N]; C, or 0, for a group without columns.

    Raises:
        ValueError: As `fp8_gemm`; ends that do not follow one another within K.
    """
    op = "k_grouped_fp8_gemm"
    _check_block(op, "b", b, (ROWS,))
    M, N, _ = _shapes(op, a, b, 2, 2)
    K, dtype = a.shape[1], torch.float32
    same_device(op, a=a.data, b=b.data, ends=ends_G, c=c_GMN, out=out_GMN)
    G = checked_ends(op, ends_G, K, alignment, BLOCK_K)
    _operand(op, "c", c_GMN, (G, M, N), dtype)
    if looks_at_values(a.data):
        used_k = (group_layout.rows_of(ends_G, K, alignment).view(-1, BLOCK_K) >= 0).any(1)
        _finite(op, a=a.scale[:, used_k], b=b.scale[:, used_k])
    out_GMN = _result(op, out_GMN, (G, M, N), dtype, a.device)
    return implementation(op, a.data)(a, b, ends_G, c_GMN, out_GMN, alignment)


def checked_rows(op: str, layout: Tensor, M: int, G: int, psum: bool, alignment: int) -> Tensor:
    """The group of each row, from either kind of layout, looked at where that is cheap."""
    group_layout.check_alignment(op, alignment, 16)
    want = [G] if psum else [M]
    if layout.dtype != torch.int32 or list(layout.shape) != want:
        raise ValueError(
            f"{op}: layout must be int32 {want}, the {'ends of the groups' if psum else 'group of each row'}, "
            f"got {layout.dtype} {list(layout.shape)}"
        )
    if psum:
        if looks_at_values(layout):
            group_layout.check_ends(op, layout, M, alignment)
        return group_layout.rows_of(layout, M, alignment)
    if looks_at_values(layout):
        group_layout.check_rows(op, layout, G, alignment)
    return layout


def checked_ends(op: str, ends_G: Tensor, K: int, alignment: int, step: int) -> int:
    """The number of groups of K that end there."""
    group_layout.check_alignment(op, alignment, step)
    if ends_G.dtype != torch.int32 or ends_G.dim() != 1:
        raise ValueError(f"{op}: ends must be int32 [G], got {ends_G.dtype} {list(ends_G.shape)}")
    if looks_at_values(ends_G):
        group_layout.check_ends(op, ends_G, K, alignment)
    return len(ends_G)


def check_counts(op: str, counts_G: Tensor, G: int, M: int) -> None:
    """Raise `ValueError` unless these are the rows used of [G, M]."""
    if counts_G.dtype != torch.int32 or list(counts_G.shape) != [G]:
        raise ValueError(f"{op}: counts must be int32 [{G}], got {counts_G.dtype} {list(counts_G.shape)}")
    if G and looks_at_values(counts_G):
        low, high = counts_G.aminmax()
        if low < 0 or high > M:
            raise ValueError(f"{op}: counts must lie in [0, {M}], got {int(low)} to {int(high)}")


def _shapes(op: str, a: Fp8Tensor, b: Fp8Tensor, a_dims: int, b_dims: int) -> tuple[int, int, int]:
    """M, N and G; for two matrices G is 1."""
    names = {2: "[{}, K]", 3: "[G, {}, K]"}
    if len(a.shape) != a_dims or len(b.shape) != b_dims or a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{op}: want a {names[a_dims].format('M')} and b {names[b_dims].format('N')}, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    if a_dims == 3 and a.shape[0] != b.shape[0]:
        raise ValueError(f"{op}: a has {a.shape[0]} groups and b {b.shape[0]}")
    _check_block(op, "a", a, (ROWS,))
    _check_block(op, "b", b, (SQUARES, ROWS))
    if a.shape[-1] % BLOCK_K:
        raise ValueError(
            f"{op}: K must be a multiple of {BLOCK_K}, the block that shares a scale, got a {list(a.shape)}; fill both "
            f"operands with zeros up to {group_layout.aligned(a.shape[-1], BLOCK_K)}, which adds nothing to the result"
        )
    return a.shape[-2], b.shape[-2], b.shape[0] if b_dims == 3 else 1


def _check_block(op: str, name: str, x: Fp8Tensor, allowed: tuple[tuple[int, int], ...]) -> None:
    if x.block not in allowed:
        raise ValueError(f"{op}: {name} must be in blocks {' or '.join(map(str, allowed))}, got {x.block}")


def _dtype(op: str, dtype: torch.dtype | None, *given: Tensor | None) -> torch.dtype:
    found = dtype or next((x.dtype for x in given if x is not None), torch.bfloat16)
    if found not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{op}: the result must be bfloat16 or float32, got {found}")
    return found


def _operand(op: str, name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x is not None and (x.shape != shape or x.dtype != dtype):
        raise ValueError(f"{op}: {name} must be {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}")


def _result(op: str, out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    _operand(op, "out", out, shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device) if out is None else out


def _finite(op: str, **scales: Tensor) -> None:
    for name, scale in scales.items():
        if looks_at_values(scale) and not scale.isfinite().all():
            raise ValueError(f"{op}: scales of {name} hold NaN or infinity; its source was not finite")
