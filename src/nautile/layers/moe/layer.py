"""DeepSeekMoE: fine-grained routed experts beside shared ones (arXiv 2401.06066 §3; V3 eq. 12)."""

from torch import nn

from nautile.layers.ffn import SwiGLU
from nautile.layers.moe.dispatch import Dispatcher, LocalDispatcher
from nautile.layers.moe.experts import Experts
from nautile.layers.moe.router import Router


class MoE(nn.Module):
    """Parts of one MoE feed-forward; `nautile.layers.block` runs them as the stages dispatch, experts, combine.

    Args:
        router: The gate.
        experts: The routed experts.
        shared_experts: SwiGLU that every token visits, or None.
        dispatcher: How tokens reach the experts; local by default.
    """

    gate: Router
    experts: Experts
    shared_experts: SwiGLU | None

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared_experts: SwiGLU | None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self.gate = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.dispatcher: Dispatcher = dispatcher or LocalDispatcher()
