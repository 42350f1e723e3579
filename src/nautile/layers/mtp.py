"""Multi-token prediction (V3 §2.2): one more block that predicts one token further.

    h'_i = M [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_i^{k−1})],   h^k = RMSNorm(Block(h'))

Two things differ from the paper's eq. 21, because the published weights need them: the embedding comes first in the
concatenation, and h^0 is the main model's hidden state *after* its final norm. Embedding and output head are the
main model's own.
"""

import torch
from torch import Tensor, nn

from nautile.core.context import ForwardContext
from nautile.layers.block import Block
from nautile.layers.decoder import DecoderOutput
from nautile.layers.norm import RMSNorm


class SharedHead(nn.Module):
    """Norm in front of the shared output head; named as in the published tensors (`shared_head.norm`)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.norm(x_BSD)


class MTPModule(nn.Module):
    """Prediction depth k. Attribute names are those of the published tensors, with the block under `block`."""

    def __init__(self, dim: int, eps: float, block: Block) -> None:
        super().__init__()
        self.enorm = RMSNorm(dim, eps)
        self.hnorm = RMSNorm(dim, eps)
        self.eh_proj = nn.Linear(2 * dim, dim, bias=False)
        self.block = block
        self.shared_head = SharedHead(dim, eps)

    def forward(self, hidden_BSD: Tensor, embedded_BSD: Tensor, ctx: ForwardContext) -> DecoderOutput:
        """Hidden states of depth k−1 and embeddings of the tokens k further on → hidden states of depth k."""
        joined = torch.cat([self.enorm(embedded_BSD), self.hnorm(hidden_BSD)], dim=-1)
        # Back to the width of the embedding: under autocast the residual stream stays float32 here, too.
        state = self.block(self.eh_proj(joined).to(embedded_BSD.dtype), ctx)
        routing = () if state.routing is None else (state.routing,)
        index_losses = () if state.index_loss is None else (state.index_loss,)
        return DecoderOutput(self.shared_head(state.x_BSD), routing, index_losses)
