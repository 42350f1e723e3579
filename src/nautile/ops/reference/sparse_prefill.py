"""Specification of `nautile.ops.sparse_mla_prefill`: the sink is one more key, whose value is zero."""

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype, compute_dtype, no_autocast


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def sparse_mla_prefill(
    q_SHX: Tensor,
    kv_TX: Tensor,
    rows_SK: Tensor,
    scale: float,
    v_dim: int,
    sink_H: Tensor | None = None,
    topk_length_S: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather, then attend, in float32 or better from the rounded inputs to the rounded output."""
    dtype, wide = compute_dtype(q_SHX), accumulate_dtype(q_SHX)
    S, H, _ = q_SHX.shape
    T = kv_TX.shape[0]
    valid_SK = valid_places(rows_SK, T, topk_length_S)
    with no_autocast(q_SHX):
        # Unused places read a row of zeros behind the last one: what stands in kv where they point may be NaN.
        kv_TX = torch.cat([kv_TX.to(dtype), kv_TX.new_zeros(1, kv_TX.shape[1], dtype=dtype)])
        kv_SKX = kv_TX[rows_SK.long().where(valid_SK, T)].to(wide)
        scores_SHK = scale * torch.einsum("shx,skx->shk", q_SHX.to(dtype).to(wide), kv_SKX)
        seen_S1K = valid_SK[:, None]
        # The lowest number instead of −inf: a query without rows gets finite weights, which are then taken away.
        lowest, highest = torch.finfo(wide).min, torch.finfo(wide).max
        logits_SHK = scores_SHK.where(seen_S1K, lowest)
        if sink_H is not None:
            sink_SH1 = sink_H.to(wide).clamp(lowest, highest).expand(S, H)[..., None]
            logits_SHK = torch.cat([logits_SHK, sink_SH1], -1)
        p_SHK = logits_SHK.softmax(-1)[..., : rows_SK.shape[1]].where(seen_S1K, 0.0)
        o_SHV = torch.einsum("shk,skv->shv", p_SHK, kv_SKX[..., :v_dim]).to(dtype)
        max_logits_SH, lse_SH = statistics(scores_SHK.detach(), seen_S1K)
    return o_SHV, max_logits_SH, lse_SH


def valid_places(rows_SK: Tensor, T: int, topk_length_S: Tensor | None) -> Tensor:
    """Which places of `rows_SK` name one of T rows and count."""
    valid_SK = (rows_SK >= 0) & (rows_SK < T)
    if topk_length_S is None:
        return valid_SK
    return valid_SK & (torch.arange(rows_SK.shape[1], device=rows_SK.device) < topk_length_S[:, None])


def statistics(scores_SHK: Tensor, seen_S1K: Tensor) -> tuple[Tensor, Tensor]:
    """Largest score and natural logarithm of the sum of exponentials; −inf and +inf where nothing is seen."""
    infinity = float("inf")
    none_SH = scores_SHK.new_full((*scores_SHK.shape[:2], 1), -infinity)  # amax wants at least one
    scores_SHK = torch.cat([scores_SHK.where(seen_S1K, -infinity), none_SH], -1)
    lse_SH = scores_SHK.logsumexp(-1)
    return scores_SHK.amax(-1), lse_SH.where(seen_S1K.any(-1), infinity)
