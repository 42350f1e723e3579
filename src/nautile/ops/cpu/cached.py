"""Attention to the rows of a cache, a block of queries and a few heads at a time: memory does not grow with S · T · H.

One sequence after the other, each over the rows that it has, so that a short one does not pay for a long one beside
it. Single queries multiply the cache where it lies; several turn and copy it once, which makes each product faster.
No backward: with a gradient to come, and for several sequences of a few rows, the specification runs in one go.
"""

import torch
from torch import Tensor

from nautile.ops.cpu import mla_decode
from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.cpu.support import needs_gradient
from nautile.ops.precision import compute_dtype, no_autocast
from nautile.ops.reference import cached as reference

__all__ = ["cached_attention", "latent_attention", "why_not"]

_BUFFER = 4 << 20
"""Bytes of scores that exist at once: some of a core's share of the last-level cache."""
_FEW = 1 << 15
"""Scores of a sequence, S · T · H, below which a pass for each sequence costs more than one over all."""
_COPIED_FROM = 8
"""Rows of queries per key head from which on keys are turned once instead of in each product."""


def cached_attention(
    q_BSHQ: Tensor,
    k_BTGQ: Tensor,
    v_BTGV: Tensor,
    positions_BS: Tensor,
    scale: float,
    selected_BST: Tensor | None = None,
) -> Tensor:
    """See `nautile.ops.cached_attention`."""
    dtype, (B, S, H, _) = compute_dtype(q_BSHQ), q_BSHQ.shape
    if needs_gradient(q_BSHQ, k_BTGQ, v_BTGV) or (B > 1 and S * H * k_BTGQ.shape[1] < _FEW):
        return reference.cached_attention(q_BSHQ, k_BTGQ, v_BTGV, positions_BS, scale, selected_BST)
    out_BSHV = torch.empty(B, S, H, v_BTGV.shape[-1], dtype=dtype)
    with no_autocast(q_BSHQ):
        for b, positions in enumerate(positions_BS.tolist()):
            T = max(positions) + 1
            q, k, v = q_BSHQ[b].to(dtype), k_BTGQ[b, :T].to(dtype), v_BTGV[b, :T].to(dtype)
            selected_ST = None if selected_BST is None else selected_BST[b]
            _attend(q, k, v, positions, scale, selected_ST, out_BSHV[b])
    return out_BSHV


def _attend(
    q_SHQ: Tensor,
    k_TGQ: Tensor,
    v_TGV: Tensor,
    positions: list[int],
    scale: float,
    selected_ST: Tensor | None,
    out_SHV: Tensor,
) -> None:
    """One sequence; the J = H / G queries that share a key head are J rows of one product."""
    (S, H, _), (T, G, _) = q_SHQ.shape, k_TGQ.shape
    J = H // G
    q_GXQ = q_SHQ.unflatten(1, (G, J)).transpose(0, 1).reshape(G, S * J, -1)
    k_GQT, v_GTV = k_TGQ.permute(1, 2, 0), v_TGV.transpose(0, 1)
    if S * J >= _COPIED_FROM:
        k_GQT, v_GTV = k_GQT.contiguous(), v_GTV.contiguous()
    out_GSJV = out_SHV.unflatten(1, (G, J)).transpose(0, 1)
    room = _BUFFER // q_SHQ.element_size()
    size = max(1, min(128, max(16, room // T)) // J)
    buffer = q_SHQ.new_empty(min(max(room, size * J * T), S * H * T))
    for start in range(0, S, size):
        block = positions[start : start + size]
        end, t = start + len(block), max(block) + 1
        heads = max(1, room // (len(block) * J * t))
        first = min(block) + 1 if selected_ST is None else 0
        hidden_S1T = _hidden(block, first, t, None if selected_ST is None else selected_ST[start:end, :t])
        for g in range(0, G, heads):
            some, rows = slice(g, g + heads), slice(start * J, end * J)
            q, k = q_GXQ[some, rows], k_GQT[some, :, :t]
            scores = buffer[: q.shape[0] * q.shape[1] * t].view(q.shape[0], q.shape[1], t)
            torch.baddbmm(scores, q, k, beta=0.0, alpha=scale, out=scores)
            if first < t:
                scores.unflatten(1, (-1, J))[..., first:].masked_fill_(hidden_S1T, float("-inf"))
            o_GXV = torch.bmm(torch.softmax(scores, -1, out=scores), v_GTV[some, :t])
            out_GSJV[some, start:end] = o_GXV.unflatten(1, (-1, J))


def latent_attention(
    q_BSHC: Tensor, q_rope_BSHR: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, positions_BS: Tensor, scale: float
) -> Tensor:
    """See `nautile.ops.latent_attention`. Few queries run in C++; many as products whose rows are the heads of each."""
    dtype, (B, S, H, C) = compute_dtype(q_BSHC), q_BSHC.shape
    inputs = (q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR)
    learns = needs_gradient(*inputs)
    if not learns and dtype == q_BSHC.dtype and mla_decode.takes(*inputs):
        return mla_decode.decode(*inputs, positions_BS, scale)[0]
    if learns or (B > 1 and S * H * c_BTC.shape[1] < _FEW):
        return reference.latent_attention(*inputs, positions_BS, scale)
    out_BSHC = torch.empty(B, S, H, C, dtype=dtype)
    with no_autocast(q_BSHC):
        for b, positions in enumerate(positions_BS.tolist()):
            size = max(1, _BUFFER // (H * (max(positions) + 1) * dtype.itemsize))
            for start in range(0, S, size):
                block, s = positions[start : start + size], slice(start, start + size)
                first, t = min(block) + 1, max(block) + 1
                q, q_rope = q_BSHC[b, s].to(dtype).flatten(0, 1), q_rope_BSHR[b, s].to(dtype).flatten(0, 1)
                c, k_rope = c_BTC[b, :t].to(dtype), k_rope_BTR[b, :t].to(dtype)
                scores = q.new_empty(q.shape[0], t)
                torch.addmm(scores, q, c.t(), beta=0.0, alpha=scale, out=scores).addmm_(q_rope, k_rope.t(), alpha=scale)
                if first < t:
                    scores.unflatten(0, (-1, H))[..., first:].masked_fill_(_hidden(block, first, t), float("-inf"))
                out_BSHC[b, s] = torch.mm(torch.softmax(scores, -1, out=scores), c).unflatten(0, (-1, H))
    return out_BSHC


def _hidden(positions: list[int], first: int, end: int, selected_ST: Tensor | None = None) -> Tensor:
    """Boolean [S, 1, T], True where a query does not look; T are the rows from `first` to `end`."""
    later_ST = torch.arange(first, end) > torch.tensor(positions, dtype=torch.int64)[:, None]
    return (later_ST if selected_ST is None else later_ST.logical_or_(~selected_ST))[:, None]
