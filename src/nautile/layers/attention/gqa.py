"""Grouped-query attention (arXiv 2305.13245) with half-split RoPE: Llama, Qwen2 and DeepSeekMoE-16B.

    q = W_q x + b_q,  k = W_k x + b_k,  v = W_v x + b_v       H query heads, G key heads; biases where published
    q, k ← rotated by position, dimension i together with i + P/2
    o_h = softmax(scale · q_h · k_g) v_g,  g = h // (H / G)

With G = H this is plain multi-head attention (DeepSeekMoE-16B, DeepSeek-Coder 1.3B and 6.7B).

B sequences, S queries, T keys, D model, H query heads, G key heads of J = H / G query heads each, P head width.
"""

from torch import Tensor

from nautile import ops
from nautile.core.context import CacheSpec, ForwardContext
from nautile.layers.attention.base import Attention
from nautile.layers.linear import Linear
from nautile.layers.rope import Rope


class GroupedQueryAttention(Attention):
    """One attention layer. Attribute names are those of the published tensors.

    Args:
        layer: Index of this layer in the cache.
        dim: Width D of the hidden state.
        n_heads: Query heads H, a multiple of G.
        n_kv_heads: Key and value heads G.
        head_dim: Width P of a head, even.
        rope: Rotation of the P dimensions.
        qkv_bias: Whether queries, keys and values have biases (Qwen2).
        output_bias: Whether the output has one (Llama's `attention_bias` means all four).
    """

    def __init__(
        self,
        layer: int,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        rope: Rope,
        qkv_bias: bool = False,
        output_bias: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads, self.head_dim = layer, n_heads, n_kv_heads, head_dim
        self.rope = rope
        self.scale = head_dim**-0.5
        self.q_proj = Linear(dim, n_heads * head_dim, bias=qkv_bias)
        self.k_proj = Linear(dim, n_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = Linear(dim, n_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = Linear(n_heads * head_dim, dim, bias=output_bias)

    def forward(self, x_BSD: Tensor, ctx: ForwardContext) -> Tensor:
        """[B, S, D] → [B, S, D]; over the rows of the cache where there are past tokens."""
        q_BSHP, k_BSGP, v_BSGP = self.project(x_BSD, ctx)
        rows = {}
        if ctx.cache is not None:
            rows = ctx.cache.update(self.layer, ctx.positions_BS, k=k_BSGP, v=v_BSGP)
        if ctx.cache is None or ctx.from_start:
            o_BSHP = ops.causal_attention(q_BSHP, k_BSGP, v_BSGP, self.scale, ctx.document_ids_BS())
        else:
            o_BSHP = ops.cached_attention(q_BSHP, rows["k"], rows["v"], ctx.positions_BS, self.scale)
        return self.o_proj(o_BSHP.flatten(2))

    def project(self, x_BSD: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B,S,H,P] and keys [B,S,G,P], both rotated, and values [B,S,G,P]."""
        q_BSHP = self.q_proj(x_BSD).unflatten(-1, (self.n_heads, self.head_dim))
        k_BSGP = self.k_proj(x_BSD).unflatten(-1, (self.n_kv_heads, self.head_dim))
        v_BSGP = self.v_proj(x_BSD).unflatten(-1, (self.n_kv_heads, self.head_dim))
        cos, sin = self.rope.cos_sin(ctx.positions_BS)
        return ops.rotate_half_split(q_BSHP, cos, sin), ops.rotate_half_split(k_BSGP, cos, sin), v_BSGP

    def cache_spec(self) -> CacheSpec:
        """2·G·P numbers per token: rotated keys, and values."""
        one_token = (self.n_kv_heads, self.head_dim)
        return CacheSpec(paged={"k": one_token, "v": one_token})
