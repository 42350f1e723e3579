"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 §2.1; V3 eq. 1-11).

Keys and values of all heads come from one latent per token, which is all the cache needs:

    c_q = RMSNorm(W_a x),  q = W_b c_q                    per head [q_nope | q_rope]
    [c | k_rope] = W_kv x,  c ← RMSNorm(c)                one rotated key for all heads
    [k_nope | v] = W_kv_b c                               per head
    o = softmax(scale · (q_nope·k_nope + q_rope·k_rope)) v

*Expanded* form: compute k and v of every token (training, reading a prompt). *Absorbed* form: fold W_UK into the query
and W_UV into the output and attend over the latents themselves (decoding), since q·(W_UK c) = (W_UKᵀ q)·c.

B sequences, S queries, T keys, D model, H heads, N nope, R rope, V value, C latent.
"""

import torch
from torch import Tensor

from nautile import ops
from nautile.core.context import CacheSpec, ForwardContext
from nautile.layers.attention.base import Attention
from nautile.layers.linear import Linear
from nautile.layers.norm import RMSNorm
from nautile.layers.rope import Rope

LATENT_EPS = 1e-6
"""Epsilon of the two latent norms, whatever `rms_norm_eps` says: released models were trained so."""
EXPANDED_AT_ONCE = 1 << 23
"""Numbers of keys and values that are expanded from cached latents at once, a few heads': 32 MiB in float32."""


class MLA(Attention):
    """One attention layer. Attribute names are those of the published tensors.

    Args:
        layer: Index of this layer in the cache.
        dim: Width D of the hidden state.
        n_heads: Query heads H.
        q_lora_rank: Width of the query latent, or None for one full projection.
        kv_lora_rank: Width C of the key-value latent.
        nope_dim: Dimensions N of a head without position.
        rope_dim: Rotated dimensions R of a head.
        v_dim: Value dimensions V of a head.
        rope: Rotation of the R dimensions.
    """

    def __init__(
        self,
        layer: int,
        dim: int,
        n_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        nope_dim: int,
        rope_dim: int,
        v_dim: int,
        rope: Rope,
    ) -> None:
        super().__init__()
        self.layer, self.n_heads, self.rope = layer, n_heads, rope
        self.kv_lora_rank, self.nope_dim, self.rope_dim, self.v_dim = kv_lora_rank, nope_dim, rope_dim, v_dim
        self.scale = (nope_dim + rope_dim) ** -0.5 * rope.softmax_factor
        q_width = n_heads * (nope_dim + rope_dim)
        if q_lora_rank is None:
            self.q_proj = Linear(dim, q_width, bias=False)
        else:
            self.q_a_proj = Linear(dim, q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(q_lora_rank, q_width, bias=False)
        self.has_q_latent = q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(dim, kv_lora_rank + rope_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, LATENT_EPS)
        self.kv_b_proj = Linear(kv_lora_rank, n_heads * (nope_dim + v_dim), bias=False)
        self.o_proj = Linear(n_heads * v_dim, dim, bias=False)

    def forward(self, x_BSD: Tensor, ctx: ForwardContext) -> Tensor:
        """[B, S, D] → [B, S, D]; expanded over whole sequences, over a cache in the form that multiplies less."""
        q_nope_BSHN, q_rope_BSHR, c_BSC, k_rope_BSR = self.project(x_BSD, ctx)
        if ctx.cache is None:
            o_BSHV = self.attend_expanded(q_nope_BSHN, q_rope_BSHR, c_BSC, k_rope_BSR, ctx.document_ids_BS())
        else:
            rows = ctx.cache.update(self.layer, ctx.positions_BS, c_kv=c_BSC, k_rope=k_rope_BSR)
            T = x_BSD.shape[1] if ctx.from_start else rows["c_kv"].shape[1]
            c_BTC, k_rope_BTR = rows["c_kv"][:, :T], rows["k_rope"][:, :T]
            o_BSHV = self.attend_cached(q_nope_BSHN, q_rope_BSHR, c_BTC, k_rope_BTR, ctx.positions_BS)
        return self.o_proj(o_BSHV.flatten(2))

    def project(self, x_BSD: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [B,S,H,N] and [B,S,H,R], latent [B,S,C] and shared key [B,S,R]; rotated and normalised."""
        angles = self.rope.cos_sin(ctx.positions_BS)
        return *self.queries(self.query_source(x_BSD), angles), *self.latents(x_BSD, angles)

    def query_source(self, x_BSD: Tensor) -> Tensor:
        """What queries are projected from: the normalised query latent, or x itself in a model without one."""
        return self.q_a_layernorm(self.q_a_proj(x_BSD)) if self.has_q_latent else x_BSD

    def queries(self, source_BSL: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B,S,H,N] and, rotated, [B,S,H,R] from `query_source`."""
        q = self.q_b_proj(source_BSL) if self.has_q_latent else self.q_proj(source_BSL)
        q_nope_BSHN, q_rope_BSHR = q.unflatten(-1, (self.n_heads, -1)).split([self.nope_dim, self.rope_dim], dim=-1)
        return q_nope_BSHN, ops.rotate_interleaved(q_rope_BSHR, *angles)

    def latents(self, x_BSD: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Normalised latent [B,S,C] and rotated shared key [B,S,R]: what the cache holds."""
        c_BSC, k_rope_BSR = self.kv_a_proj_with_mqa(x_BSD).split([self.kv_lora_rank, self.rope_dim], dim=-1)
        k_rope_BSR = ops.rotate_interleaved(k_rope_BSR[:, :, None], *angles)[:, :, 0]
        return self.kv_a_layernorm(c_BSC), k_rope_BSR

    def attend_expanded(
        self,
        q_nope_BSHN: Tensor,
        q_rope_BSHR: Tensor,
        c_BSC: Tensor,
        k_rope_BSR: Tensor,
        document_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of whole sequences, [B, S, H, V]; never across documents if ids are given."""
        q_BSHQ, k_BSHQ, v_BSHV = self.expand(q_nope_BSHN, q_rope_BSHR, c_BSC, k_rope_BSR)
        return ops.causal_attention(q_BSHQ, k_BSHQ, v_BSHV, self.scale, document_ids_BS)

    def expand(
        self, q_nope_BSHN: Tensor, q_rope_BSHR: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, first: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, H, N + R], keys [B, T, H, N + R] and values [B, T, H, V] of the heads from `first` on."""
        H = q_nope_BSHN.shape[2]
        weight_HXC = self.kv_b_proj.weight.unflatten(0, (self.n_heads, -1))[first : first + H]
        kv_BTHX = ops.linear(c_BTC, weight_HXC.flatten(0, 1)).unflatten(-1, (H, -1))
        k_nope_BTHN, v_BTHV = kv_BTHX.split([self.nope_dim, self.v_dim], dim=-1)
        k_rope_BTHR = k_rope_BTR[:, :, None].expand(-1, -1, H, -1)
        q_BSHQ = join_heads(q_nope_BSHN, q_rope_BSHR)
        k_BTHQ = join_heads(k_nope_BTHN, k_rope_BTHR.to(k_nope_BTHN.dtype))
        return q_BSHQ, k_BTHQ, v_BTHV

    def attend_cached(
        self,
        q_nope_BSHN: Tensor,
        q_rope_BSHR: Tensor,
        c_BTC: Tensor,
        k_rope_BTR: Tensor,
        positions_BS: Tensor,
        selected_BST: Tensor | None = None,
    ) -> Tensor:
        """Attention to the rows of a cache, [B, S, H, V], in the form that multiplies less.

        `selected_BST`, if given, is True where a query reads a row, and asks for the expanded form. Heads are expanded
        a few at a time, so that memory follows the cache and not its expansion.
        """
        S, (B, T) = q_nope_BSHN.shape[1], c_BTC.shape[:2]
        if selected_BST is None and self.cost_absorbed(S, T) <= self.cost_expanded(S, T):
            return self.attend_absorbed(q_nope_BSHN, q_rope_BSHR, c_BTC, k_rope_BTR, positions_BS)
        o_BSHV = q_nope_BSHN.new_empty(*q_nope_BSHN.shape[:3], self.v_dim)
        step = max(1, EXPANDED_AT_ONCE // (B * T * (self.nope_dim + self.rope_dim + self.v_dim)))
        for h in range(0, self.n_heads, step):
            q_BSHQ, k_BTHQ, v_BTHV = self.expand(
                q_nope_BSHN[:, :, h : h + step], q_rope_BSHR[:, :, h : h + step], c_BTC, k_rope_BTR, h
            )
            some = ops.cached_attention(q_BSHQ, k_BTHQ, v_BTHV, positions_BS, self.scale, selected_BST)
            o_BSHV[:, :, h : h + step] = some
        return o_BSHV

    def attend_absorbed(
        self, q_nope_BSHN: Tensor, q_rope_BSHR: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, positions_BS: Tensor
    ) -> Tensor:
        """Attention over latents up to each query's position, [B, S, H, V]."""
        W_uk_HNC, W_uv_HVC = self.up_projections()
        q_BSHC = torch.einsum("bshn,hnc->bshc", q_nope_BSHN, W_uk_HNC)
        o_BSHC = ops.latent_attention(q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR, positions_BS, self.scale)
        return torch.einsum("bshc,hvc->bshv", o_BSHC, W_uv_HVC)

    def cost_expanded(self, S: int, T: int) -> int:
        """Multiplications per head of S queries over T rows whose keys and values are expanded for them."""
        out = self.nope_dim + self.v_dim
        return T * self.kv_lora_rank * out + S * T * (out + self.rope_dim)

    def cost_absorbed(self, S: int, T: int) -> int:
        """The same over latents: no expansion, wider scores."""
        out = self.nope_dim + self.v_dim
        return S * self.kv_lora_rank * out + S * T * (2 * self.kv_lora_rank + self.rope_dim)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, N, C] and W_UV [H, V, C], the two halves of `kv_b_proj`."""
        W_HXC = self.kv_b_proj.weight.unflatten(0, (self.n_heads, -1))
        W_uk_HNC, W_uv_HVC = W_HXC.split([self.nope_dim, self.v_dim], dim=1)
        return W_uk_HNC, W_uv_HVC

    def cache_spec(self) -> CacheSpec:
        """C + R numbers per token, for all heads together (V2 §2.1.4)."""
        return CacheSpec(paged={"c_kv": (self.kv_lora_rank,), "k_rope": (self.rope_dim,)})


def join_heads(nope_BSHN: Tensor, rope_BSHR: Tensor) -> Tensor:
    """[B, S, H, N + R], laid out in memory head by head, as attention multiplies it: one copy instead of two."""
    return torch.cat([nope_BSHN.transpose(1, 2), rope_BSHR.transpose(1, 2)], dim=-1).transpose(1, 2)
