"""Specification of `nautile.ops.paged_mla_decode`."""

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype
from nautile.ops.split_kv import Splits


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def paged_mla_decode(
    q_BSHX: Tensor,
    cache_NPGX: Tensor,
    block_table_BW: Tensor,
    lengths_B: Tensor,
    v_dim: int,
    scale: float,
    causal: bool,
    splits: Splits | None,
) -> tuple[Tensor, Tensor]:
    """Request by request, in float32 or better."""
    (B, S, H, _), (_, P, G, _) = q_BSHX.shape, cache_NPGX.shape
    wide = accumulate_dtype(q_BSHX)
    o_BSHV = q_BSHX.new_empty(B, S, H, v_dim)
    lse_BHS = q_BSHX.new_empty(B, H, S, dtype=wide)
    for b, length in enumerate(lengths_B.tolist()):
        pages = block_table_BW[b, : -(-length // P)].long()
        k_TGX = cache_NPGX[pages].flatten(0, 1)[:length].to(wide)
        k_THX = k_TGX.repeat_interleave(H // G, dim=1)
        scores_SHT = scale * torch.einsum("shx,thx->sht", q_BSHX[b].to(wide), k_THX)
        if causal:
            last_S = length - S + torch.arange(S, device=q_BSHX.device)
            hidden_ST = torch.arange(length, device=q_BSHX.device) > last_S[:, None]
            scores_SHT = scores_SHT.masked_fill(hidden_ST[:, None], float("-inf"))
        p_SHT, lse_SH = softmax_and_lse(scores_SHT)
        o_BSHV[b] = torch.einsum("sht,thv->shv", p_SHT, k_THX[..., :v_dim]).to(q_BSHX.dtype)
        lse_BHS[b] = lse_SH.T
    return o_BSHV, lse_BHS


def softmax_and_lse(scores_SHT: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its natural log-sum-exp; where all is −∞, 0 and +∞."""
    lse_SH = scores_SHT.logsumexp(-1)
    lse_SH = lse_SH.masked_fill(lse_SH == float("-inf"), float("inf"))
    return torch.exp(scores_SHT - lse_SH[..., None]), lse_SH
