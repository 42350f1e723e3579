"""How tokens reach the ranks that hold their experts: the seam that expert parallelism fills."""

from typing import Protocol

from torch import Tensor

from nautile.layers.moe.router import Routing


class Dispatcher(Protocol):
    """Moves tokens to experts and answers back; the MoE layer does not know over what."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens that this rank's experts process: hidden states [R, D], local experts [R, K], weights [R, K]."""
        ...

    def combine(self, y_RD: Tensor) -> Tensor:
        """Sum of the weighted expert outputs for this rank's own tokens, [T, D]."""
        ...


class LocalDispatcher:
    """Every expert lives here: nothing moves."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        return x_TD, routing.experts_TK, routing.weights_TK

    def combine(self, y_RD: Tensor) -> Tensor:
        return y_RD
