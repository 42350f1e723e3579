"""Specification of `nautile.ops.mqa_logits` and `nautile.ops.paged_mqa_logits`."""

import torch
from torch import Tensor

from nautile.ops.index_cache import index_planes
from nautile.ops.precision import no_autocast


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def mqa_logits(
    q_SJI: Tensor,
    k_TI: Tensor,
    weights_SJ: Tensor,
    start_S: Tensor,
    end_S: Tensor,
    k_scale_T: Tensor | None,
    out_SW: Tensor,
    *,
    clean: bool,
    compressed: bool,
) -> None:
    """Scores of all keys for all queries, then the window of each row."""
    T, W = k_TI.shape[0], out_SW.shape[1]
    if clean:
        out_SW.fill_(float("-inf"))
    if T == 0:
        return
    logits_ST = _weighted(q_SJI[None], k_TI[None], weights_SJ[None])[0]
    if k_scale_T is not None:
        logits_ST = logits_ST * k_scale_T
    key_SW = (torch.arange(W, device=q_SJI.device) + (start_S[:, None] if compressed else 0)).expand(len(start_S), W)
    in_window_SW = (key_SW >= start_S[:, None]) & (key_SW < end_S[:, None]) & (key_SW >= 0) & (key_SW < T)
    logits_SW = logits_ST.gather(1, key_SW.clamp(0, T - 1).long())
    out_SW[in_window_SW] = logits_SW[in_window_SW].to(out_SW.dtype)


def paged_mqa_logits(
    q_BNJI: Tensor,
    cache_PYZ: Tensor,
    weights_XJ: Tensor,
    lengths_BN: Tensor,
    pages_BM: Tensor,
    out_XW: Tensor,
    *,
    clean: bool,
) -> None:
    """Sequence by sequence: gather its pages, score, cut off at each token's length."""
    keys_PYI, scales_PY = index_planes(cache_PYZ, q_BNJI.shape[-1])
    page, N = cache_PYZ.shape[1], q_BNJI.shape[1]
    if clean:
        out_XW.fill_(float("-inf"))
    for b, lengths in enumerate(lengths_BN.tolist()):
        pages = pages_BM[b, : -(-max(lengths, default=0) // page)].long()
        k_TI, scale_T = keys_PYI[pages].flatten(0, 1), scales_PY[pages].flatten()
        weights_NJ = weights_XJ[b * N : (b + 1) * N]
        logits_NT = _weighted(q_BNJI[b][None], k_TI[None], weights_NJ[None])[0] * scale_T
        for n, length in enumerate(lengths):
            out_XW[b * N + n, :length] = logits_NT[n, :length]


def _weighted(q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor) -> Tensor:
    """Σ_j w_sj · relu(q_sj · k_t) in the dtype of the weights, a head at a time: this is what runs on a CPU, too."""
    wide = weights_BSJ.dtype
    B, S, J, _ = q_BSJI.shape
    k_BIT = k_BTI.to(wide).mT
    sum_BST = torch.zeros(B, S, k_BTI.shape[1], dtype=wide, device=weights_BSJ.device)
    with no_autocast(weights_BSJ):
        for j in range(J):
            sum_BST.addcmul_(weights_BSJ[:, :, j, None], torch.bmm(q_BSJI[:, :, j].to(wide), k_BIT).relu_())
    return sum_BST
