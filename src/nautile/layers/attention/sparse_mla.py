"""DeepSeek sparse attention: latent attention over the tokens that an indexer selects (DeepSeek-V3.2-Exp §2.1).

    o_s = MLA over { t ≤ s : t among the top-k of I_s }

The same selection is used in two forms that give the same numbers. Where many queries share keys and values (training,
reading a prompt) it is a mask over the expanded form. In the absorbed form the selected latents are gathered: a
generated token reads K of them however long the sequence is, and of the rest only one index key each.

B sequences, S queries, T cached tokens, D model, H heads, N nope, R rope, V value, C latent, K selected.
"""

from typing import Any

import torch
from torch import Tensor

from nautile import ops
from nautile.core.context import CacheSpec, ForwardContext
from nautile.layers.attention.indexer import Indexer, Source
from nautile.layers.attention.mla import MLA


class SparseMLA(MLA):
    """Latent attention with an indexer in front, as `self_attn.indexer.*` in the published tensors.

    While a sequence has no more tokens than the indexer selects, all are read and no scores are computed.

    Args:
        mla: Arguments of `MLA`; there is always a query latent, which the indexer shares.
        indexer: Selects the tokens.
        more: Keyword arguments of `MLA`.
    """

    def __init__(self, *mla: Any, indexer: Indexer, **more: Any) -> None:
        super().__init__(*mla, **more)
        self.indexer = indexer

    def forward(self, x_BSD: Tensor, ctx: ForwardContext) -> Tensor:
        """[B, S, D] → [B, S, D]; masked over whole sequences, over a cache in the form that multiplies less."""
        return self.attend_and_learn(x_BSD, ctx, learn=False)[0]

    def attend(self, x_BSD: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor | None]:
        """`forward`, and the indexer's loss in training mode at a stage that trains it."""
        if self.training and ctx.cache is None and ctx.index_stage in ("warmup", "sparse"):
            return self.attend_and_learn(x_BSD, ctx, learn=True)
        return self(x_BSD, ctx), None

    def attend_and_learn(self, x_BSD: Tensor, ctx: ForwardContext, learn: bool) -> tuple[Tensor, Tensor | None]:
        """What `forward` gives, and the indexer's loss if it is to learn."""
        angles = self.rope.cos_sin(ctx.positions_BS)
        c_q_BSL = self.query_source(x_BSD)
        queries = self.queries(c_q_BSL, angles)
        c_BSC, k_rope_BSR = self.latents(x_BSD, angles)
        if ctx.cache is None:
            expanded = self.expand(*queries, c_BSC, k_rope_BSR)
            o_BSHV, loss = self.attend_whole(x_BSD, c_q_BSL, angles, expanded, ctx, learn)
            return self.o_proj(o_BSHV.flatten(2)), loss
        keys_BSI = self.indexer.keys(x_BSD, angles)
        rows = ctx.cache.update(self.layer, ctx.positions_BS, c_kv=c_BSC, k_rope=k_rope_BSR, k_index=keys_BSI)
        S = x_BSD.shape[1]
        T = S if ctx.from_start else rows["c_kv"].shape[1]
        c_BTC, k_rope_BTR, keys_BTI = (rows[name][:, :T] for name in ("c_kv", "k_rope", "k_index"))
        source = (x_BSD, c_q_BSL, keys_BTI, angles)
        if self.indexer.topk >= T:
            o_BSHV = self.attend_cached(*queries, c_BTC, k_rope_BTR, ctx.positions_BS)
        elif self.cost_absorbed(S, self.indexer.topk) <= self.cost_expanded(S, T):
            rows_BSK = self.indexer.rows(*source, seen(ctx, T))
            o_BSHV = self.attend_gathered(*queries, c_BTC, k_rope_BTR, rows_BSK)
        else:
            selected_BST = self.chosen(source, ctx, T)
            o_BSHV = self.attend_cached(*queries, c_BTC, k_rope_BTR, ctx.positions_BS, selected_BST)
        return self.o_proj(o_BSHV.flatten(2)), None

    def attend_whole(
        self,
        x_BSD: Tensor,
        c_q_BSL: Tensor,
        angles: tuple[Tensor, Tensor],
        expanded: tuple[Tensor, Tensor, Tensor],
        ctx: ForwardContext,
        learn: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Whole sequences, [B, S, H, V], and the indexer's loss if asked for. `expanded`: queries, keys, values."""
        q_BSHQ, k_BSHQ, v_BSHV = expanded
        reads_all = ctx.index_stage in ("dense", "warmup") or self.indexer.topk >= x_BSD.shape[1]
        ids_BS = ctx.document_ids_BS() if reads_all else None  # a selection is within its document anyway
        if reads_all and not learn:
            return ops.causal_attention(q_BSHQ, k_BSHQ, v_BSHV, self.scale, ids_BS), None
        source = (x_BSD, c_q_BSL, self.indexer.keys(x_BSD, angles), angles)
        selected_BSS = None if reads_all else self.indexer.mask(*source, causal(ctx))
        loss = self.indexer.loss(source, q_BSHQ, k_BSHQ, self.scale, selected_BSS, ids_BS) if learn else None
        if selected_BSS is None:
            return ops.causal_attention(q_BSHQ, k_BSHQ, v_BSHV, self.scale, ids_BS), loss
        return ops.selected_attention(q_BSHQ, k_BSHQ, v_BSHV, selected_BSS, self.scale), loss

    def chosen(self, source: Source, ctx: ForwardContext, T: int) -> Tensor:
        """What the indexer selects of T rows of a cache, as a boolean [B, S, T]."""
        if ctx.from_start:
            return self.indexer.mask(*source, causal(ctx))
        rows_BSK = self.indexer.rows(*source, seen(ctx, T))
        # One column more, for the places that are not used.
        chosen_BSX = torch.zeros(*rows_BSK.shape[:2], T + 1, dtype=torch.bool, device=rows_BSK.device)
        return chosen_BSX.scatter_(-1, rows_BSK.masked_fill(rows_BSK < 0, T), True)[..., :T]

    def attend_gathered(
        self, q_nope_BSHN: Tensor, q_rope_BSHR: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, rows_BSK: Tensor
    ) -> Tensor:
        """Absorbed form over the rows that each query selected, [B, S, H, V]."""
        W_uk_HNC, W_uv_HVC = self.up_projections()
        q_BSHC = torch.einsum("bshn,hnc->bshc", q_nope_BSHN, W_uk_HNC)
        o_BSHC = ops.gathered_attention(q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR, rows_BSK, self.scale)
        return torch.einsum("bshc,hvc->bshv", o_BSHC, W_uv_HVC)

    def cache_spec(self) -> CacheSpec:
        """The latent cache, and one index key per token."""
        return CacheSpec(paged={**super().cache_spec().paged, "k_index": (self.indexer.head_dim,)})


def seen(ctx: ForwardContext, T: int) -> Tensor:
    """Boolean [B, S, T]: the rows of a cache up to each query's position."""
    return torch.arange(T, device=ctx.positions_BS.device) <= ctx.positions_BS[..., None]


def causal(ctx: ForwardContext) -> Tensor:
    """Boolean [B, S, S]: earlier positions and itself, of the same document if there are documents."""
    B, S = ctx.tokens_BS.shape
    seen_BSS = torch.ones(S, S, dtype=torch.bool, device=ctx.tokens_BS.device).tril().expand(B, S, S)
    ids_BS = ctx.document_ids_BS()
    return seen_BSS if ids_BS is None else seen_BSS & (ids_BS[:, :, None] == ids_BS[:, None, :])
