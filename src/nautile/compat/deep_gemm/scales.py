"""Scales in the layouts of DeepGEMM's kernels: columns contiguous and padded to 16 bytes, as a TMA loads them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile.compat.deep_gemm.errors import need, sm100_only
from nautile.compat.deep_gemm.operands import Granularity, Recipe
from nautile.ops.scale_packing import mn_major_scales, pack_ue8m0, tma_aligned


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """The smallest number ≥ x of elements whose bytes are a multiple of 16."""
    return tma_aligned(x, element_size)


def get_mn_major_tma_aligned_tensor(sf: Tensor) -> Tensor:
    """float32 scales [.., mn, k] with strides (.., 1, mn rounded up to 4); `sf` itself if it lies like that."""
    need(
        sf.dtype == torch.float32 and sf.dim() in (2, 3),
        "get_mn_major_tma_aligned_tensor",
        f"sf must be float32 [mn, k] or [groups, mn, k], got {sf.dtype} {list(sf.shape)}",
    )
    return mn_major_scales(sf)


def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: Tensor, psum_layout: Tensor | None = None) -> Tensor:
    """int32 [.., mn, ⌈k / 4⌉] of float32 powers of two, four exponents in each; laid out as the unpacked form.

    Raises:
        DeepGemmError: `sf` is of another kind.
        NotOnHopperError: `psum_layout` is given.
    """
    name = "get_mn_major_tma_aligned_packed_ue8m0_tensor"
    if psum_layout is not None:
        sm100_only(name, "packing the scales of a psum layout")
    need(
        sf.dtype == torch.float32 and sf.dim() in (2, 3),
        name,
        f"sf must be float32 [mn, k] or [groups, mn, k], got {sf.dtype} {list(sf.shape)}",
    )
    return mn_major_scales(sf, packed=True)


def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: Tensor,
    grouped_layout: Tensor,
    ks_cpu: list[int] | None,
    gran_k: int,
    k_alignment: int,
    use_psum_layout: bool = False,
) -> Tensor:
    """int32 [Σ ⌈k_g / (4 · gran_k)⌉, mn] of float32 powers of two [Σ k_g / gran_k, mn]: packed within each group.

    Args:
        sf: Scales of the groups, one after another along their rows.
        grouped_layout: int32 [groups], the k_g.
        ks_cpu: The same on the host.
        gran_k: Rows of the data that share a scale.
        k_alignment: What the k_g are multiples of.
        use_psum_layout: Must be False on SM90.

    Raises:
        DeepGemmError: Arguments do not fit together.
        NotOnHopperError: A psum layout is asked for.
    """
    name = "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor"
    if use_psum_layout or not ks_cpu:
        sm100_only(name, "packing the scales of a psum layout, or without ks_cpu,")
    assert ks_cpu is not None
    need(
        sf.dtype == torch.float32 and sf.dim() == 2,
        name,
        f"sf must be float32 [k, mn], got {sf.dtype} {list(sf.shape)}",
    )
    need(len(grouped_layout) == len(ks_cpu), name, f"{len(grouped_layout)} groups on the device, {len(ks_cpu)} here")
    need(all(k % k_alignment == 0 for k in ks_cpu), name, f"every k must be a multiple of {k_alignment}, got {ks_cpu}")
    counts = [-(-k // gran_k) for k in ks_cpu]
    need(sum(counts) == len(sf), name, f"groups of {ks_cpu} have {sum(counts)} scales of {gran_k}, got {len(sf)}")
    parts = [F.pad(part.t(), (0, -len(part) % 4)) for part in sf.split(counts)]
    packed = torch.cat([pack_ue8m0(part) for part in parts], dim=1)
    return mn_major_like(packed).t()


def transform_sf_into_required_layout(
    sf: Tensor,
    mn: int,
    k: int,
    recipe: Recipe | Granularity,
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    psum_layout: Tensor | None = None,
) -> Tensor:
    """Scales as an SM90 kernel reads them: those of single rows with columns contiguous, those of blocks as they are.

    Args:
        sf: float32 [mn / rows, k / columns], with a leading dimension for groups.
        mn: Rows of the operand.
        k: Its columns.
        recipe: (rows of A, rows of B, columns) that share a scale, with `is_sfa`; or (rows, columns), without.
        num_groups: Groups of the operand; None for a single matrix.
        is_sfa: Whether these are the scales of A.
        disable_ue8m0_cast: Has no effect: scales are never cast on SM90.
        psum_layout: Has no effect on SM90.

    Raises:
        DeepGemmError: `sf` does not fit the operand.
        NotOnHopperError: The scales are packed, or finer than 128 columns.
    """
    name = "transform_sf_into_required_layout"
    if len(recipe) == 3:
        need(is_sfa is not None, name, "a recipe of three needs is_sfa")
        rows, columns = recipe[0 if is_sfa else 1], recipe[2]
    else:
        need(is_sfa is None, name, "a recipe of two says whose scales these are: leave is_sfa out")
        rows, columns = recipe
    if sf.dtype == torch.int32 or columns != 128:
        sm100_only(name, "a scale of UE8M0, or of fewer than 128 columns,")
    want = [*([] if num_groups is None else [num_groups]), -(-mn // rows), -(-k // columns)]
    need(
        sf.dtype == torch.float32 and list(sf.shape) == want,
        name,
        f"scales must be float32 {want}, one for {rows} x {columns} of {mn} x {k}, got {sf.dtype} {list(sf.shape)}",
    )
    if rows == 1:
        return mn_major_scales(sf)
    need(rows == 128, name, f"scales serve 1 or 128 rows on SM90, got {rows}")
    whole = sf.is_contiguous() or sf.mT.is_contiguous()
    need(whole, name, f"scales of blocks must be contiguous, or their transpose, got strides {list(sf.stride())}")
    return sf


def mn_major_like(x: Tensor) -> Tensor:
    """A matrix of 4-byte elements with its first dimension contiguous and padded to 16 bytes."""
    return mn_major_scales(x.view(torch.float32)).view(torch.int32)
