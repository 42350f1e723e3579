"""Embedding, a stack of blocks, a final norm."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nautile.core.context import CacheSpec, ForwardContext
from nautile.layers.block import Block
from nautile.layers.moe.router import Routing
from nautile.layers.norm import RMSNorm


@dataclass(frozen=True)
class DecoderOutput:
    """What a decoder, or one MTP module, computed for a batch."""

    hidden_BSD: Tensor
    """Hidden states after the final norm, ready for the output head."""
    routing: tuple[Routing, ...]
    """The decision of each MoE layer, bottom to top."""
    index_losses: tuple[Tensor, ...] = ()
    """The loss of each layer's indexer while indexers are trained, bottom to top."""


class Decoder(nn.Module):
    """Token ids to normalised hidden states. Attribute names are those of the published tensors."""

    def __init__(self, vocab_size: int, dim: int, blocks: Sequence[Block], eps: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(dim, eps)

    def forward(self, ctx: ForwardContext) -> DecoderOutput:
        x_BSD = self.embed_tokens(ctx.tokens_BS)
        routing, index_losses = [], []
        for block in self.layers:
            state = block(x_BSD, ctx)
            x_BSD = state.x_BSD
            if state.routing is not None:
                routing.append(state.routing)
            if state.index_loss is not None:
                index_losses.append(state.index_loss)
        return DecoderOutput(self.norm(x_BSD), tuple(routing), tuple(index_losses))

    def cache_specs(self) -> list[CacheSpec]:
        """What each layer stores per token, bottom to top."""
        return [block.cache_spec() for block in self.layers if isinstance(block, Block)]
