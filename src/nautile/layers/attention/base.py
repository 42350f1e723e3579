"""What every kind of attention offers a block."""

from torch import Tensor, nn

from nautile.core.context import CacheSpec, ForwardContext


class Attention(nn.Module):
    """One attention layer: hidden states in and out, and what it caches per token."""

    def forward(self, x_BSD: Tensor, ctx: ForwardContext) -> Tensor:
        """[B, S, D] → [B, S, D]."""
        raise NotImplementedError

    def attend(self, x_BSD: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor | None]:
        """`forward`, and beside it the loss of what chose the tokens; None where nothing does, or it is not trained."""
        return self(x_BSD, ctx), None

    def cache_spec(self) -> CacheSpec:
        """What this layer stores for every past token."""
        raise NotImplementedError
