"""Specification of the grouped products: one product per group, in a loop."""

import torch
from torch import Tensor

from nautile.ops import group_layout
from nautile.ops.precision import no_autocast


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def grouped_gemm(
    a_MK: Tensor, b_GNK: Tensor, groups_M: Tensor, ends_G: Tensor | None, out_MN: Tensor, alignment: int
) -> Tensor:
    """See `nautile.ops.grouped_gemm`."""
    out_MN.zero_()
    for g, start, stop in group_layout.runs(groups_M):
        out_MN[start:stop] = _product(a_MK[start:stop], b_GNK[g].t(), out_MN.dtype)
    return out_MN


def masked_gemm(a_GMK: Tensor, b_GNK: Tensor, counts_G: Tensor, out_GMN: Tensor) -> Tensor:
    """See `nautile.ops.masked_gemm`."""
    for g, count in enumerate(counts_G.tolist()):
        out_GMN[g, :count] = _product(a_GMK[g, :count], b_GNK[g].t(), out_GMN.dtype)
    return out_GMN


def k_grouped_gemm(
    a_KM: Tensor, b_KN: Tensor, ends_G: Tensor, c_GMN: Tensor | None, out_GMN: Tensor, alignment: int
) -> Tensor:
    """See `nautile.ops.k_grouped_gemm`."""
    for g, (start, stop) in enumerate(group_layout.spans(ends_G, alignment)):
        wide = torch.promote_types(out_GMN.dtype, torch.float32)
        d_MN = _product(a_KM[start:stop].t(), b_KN[start:stop], wide)
        out_GMN[g] = d_MN if c_GMN is None else d_MN + c_GMN[g]
    return out_GMN


def _product(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype) -> Tensor:
    """Accumulated in float32 or better whatever autocast says; torch rounds once to the operands' dtype."""
    with no_autocast(a_MK):
        return a_MK.to(dtype) @ b_KN.to(dtype)
