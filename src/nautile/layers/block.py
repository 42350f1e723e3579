"""A decoder block as an ordered list of named stages.

Dense: attention → mlp. MoE: attention → dispatch → experts → combine. `forward` folds the stages over one batch; a
pipeline runtime may interleave the folds of two batches, so that one's dispatch hides behind the other's attention
(DualPipe, V3 §3.2.1).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from nautile.core.context import CacheSpec, ForwardContext
from nautile.layers.attention.base import Attention
from nautile.layers.ffn import SwiGLU
from nautile.layers.moe.layer import MoE
from nautile.layers.moe.router import Routing
from nautile.layers.norm import RMSNorm
from nautile.layers.residual import read, residual, write


@dataclass(frozen=True)
class BlockState:
    """What one stage hands to the next."""

    x_BSD: Tensor
    """The residual stream."""
    ctx: ForwardContext
    routing: Routing | None = None
    """Set by dispatch."""
    index_loss: Tensor | None = None
    """Set by attention whose indexer is being trained: its loss per token, which reaches nothing but the indexer."""
    branch: tuple[Tensor, ...] = ()
    """Tensors of the MoE branch on their way: inputs after dispatch, outputs after experts."""


Stage = Callable[[BlockState], BlockState]


class Block(nn.Module):
    """Pre-norm block: attention, then a dense SwiGLU or an MoE. Attribute names are those of the published tensors."""

    def __init__(self, dim: int, eps: float, attention: Attention, mlp: SwiGLU | MoE) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(dim, eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(dim, eps)
        self.mlp = mlp

    @property
    def moe(self) -> MoE:
        """The feed-forward of an MoE block."""
        assert isinstance(self.mlp, MoE), "a dense block has no dispatch, experts and combine"
        return self.mlp

    def stages(self) -> list[tuple[str, Stage]]:
        """The block's work, in order."""
        if isinstance(self.mlp, MoE):
            feed_forward = [("dispatch", self.dispatch), ("experts", self.experts), ("combine", self.combine)]
        else:
            feed_forward = [("mlp", self.dense)]
        return [("attention", self.attention), *feed_forward]

    def forward(self, x_BSD: Tensor, ctx: ForwardContext) -> BlockState:
        state = BlockState(x_BSD, ctx)
        for _, stage in self.stages():
            state = stage(state)
        return state

    def attention(self, state: BlockState) -> BlockState:
        y_BSD, index_loss = self.self_attn.attend(self.input_layernorm(read(state.x_BSD)), state.ctx)
        return replace(state, x_BSD=write(state.x_BSD, y_BSD), index_loss=index_loss)

    def dense(self, state: BlockState) -> BlockState:
        x_BSD = residual(state.x_BSD, lambda x: self.mlp(self.post_attention_layernorm(x)))
        return replace(state, x_BSD=x_BSD)

    def dispatch(self, state: BlockState) -> BlockState:
        """Normalise, choose experts, send the tokens there."""
        x_BSD = self.post_attention_layernorm(read(state.x_BSD))
        routing = self.moe.gate(x_BSD)
        sent = self.moe.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
        return replace(state, routing=routing, branch=(x_BSD, *sent))

    def experts(self, state: BlockState) -> BlockState:
        """Routed experts on the tokens received, shared experts on our own."""
        x_BSD, *received = state.branch
        routed_RD = self.moe.experts(*received)
        shared = () if self.moe.shared_experts is None else (self.moe.shared_experts(x_BSD),)
        return replace(state, branch=(routed_RD, *shared))

    def combine(self, state: BlockState) -> BlockState:
        """Bring the answers home and add them to the stream."""
        routed_RD, *shared = state.branch
        y_BSD = self.moe.dispatcher.combine(routed_RD).view_as(state.x_BSD)
        for shared_BSD in shared:
            y_BSD = y_BSD + shared_BSD
        return replace(state, x_BSD=write(state.x_BSD, y_BSD), branch=())

    def cache_spec(self) -> CacheSpec:
        """What the attention of this block stores per token."""
        return self.self_attn.cache_spec()
