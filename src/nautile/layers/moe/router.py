"""Which experts a token visits, and with what weight.

Affinities s = sigmoid(W x) (V3 eq. 15) or softmax(W x) (DeepSeekMoE eq. 9), always in float32. Three selections:

- ``greedy``: the K best of s (DeepSeekMoE).
- ``group_limited_greedy``: a group scores the best s in it; the K best within the `topk_group` best groups (V2 §2.2.2).
- ``noaux_tc``: as before on s + b, with a group scored by its two best; b balances the load and has no gradient. The
  weights are the plain s of the chosen experts (V3 eq. 16).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nautile import ops
from nautile.layers.moe.balance import sequence_balance_loss

ScoringFunc = Literal["sigmoid", "softmax"]
TopkMethod = Literal["noaux_tc", "group_limited_greedy", "greedy"]


@dataclass(frozen=True)
class Routing:
    """The router's decision for T tokens."""

    experts_TK: Tensor
    """int64 [T, K]: chosen experts, best first."""
    weights_TK: Tensor
    """float32 [T, K]: weight of each chosen expert's output."""
    counts_E: Tensor
    """int64 [E]: tokens that chose each expert in this forward."""
    balance_loss: Tensor | None
    """float32 scalar: balance loss without its factor, of each sequence or of the batch (`seq_aux`); None outside
    training."""


def affinities(logits_TE: Tensor, scoring_func: ScoringFunc) -> Tensor:
    """float32 [T, E] in (0, 1)."""
    return logits_TE.sigmoid() if scoring_func == "sigmoid" else logits_TE.softmax(dim=-1)


@torch.no_grad()
def select(
    scores_TE: Tensor, bias_E: Tensor | None, method: TopkMethod, k: int, n_group: int, topk_group: int
) -> Tensor:
    """int64 [T, K]: chosen experts, best first. `bias_E` is used by noaux_tc only."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if method == "greedy":
        return ops.topk_gate(choice_TE, k)
    return ops.topk_gate(choice_TE, k, n_group, topk_group, "top2_sum" if method == "noaux_tc" else "max")


def visits(experts_TK: Tensor, E: int) -> Tensor:
    """int64 [E]: tokens that chose each expert. Not bincount, whose result has a length that a compiler cannot know."""
    choices = experts_TK.flatten()
    return choices.new_zeros(E).scatter_add_(0, choices, torch.ones_like(choices))


class Router(nn.Module):
    """Gate of one MoE layer: hidden states in, `Routing` out.

    `e_score_correction_bias` is a float32 buffer [E], present with noaux_tc: not trained by gradient, moved by
    `nautile.layers.moe.balance.update_bias_` after each step. Keep it float32: near the published values of 5, bfloat16
    steps by 0.03, thirty times the update speed.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        n_experts: int,
        k: int,
        *,
        scoring_func: ScoringFunc,
        method: TopkMethod,
        n_group: int = 1,
        topk_group: int = 1,
        normalise: bool,
        scaling_factor: float,
        sequence_balance: bool = True,
    ) -> None:
        super().__init__()
        self.k, self.n_group, self.topk_group = k, n_group, topk_group
        self.scoring_func, self.method = scoring_func, method
        self.normalise, self.scaling_factor = normalise, scaling_factor
        self.sequence_balance = sequence_balance
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        bias_E = torch.zeros(n_experts, dtype=torch.float32) if method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(self, x_BSD: Tensor) -> Routing:
        B, _, D = x_BSD.shape
        with torch.autocast(x_BSD.device.type, enabled=False):
            scores_TE = affinities(F.linear(x_BSD.reshape(-1, D).float(), self.weight.float()), self.scoring_func)
        experts_TK = select(scores_TE, self.e_score_correction_bias, self.method, self.k, self.n_group, self.topk_group)
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        E = scores_TE.shape[1]
        balance_loss = None
        if self.training:
            rows = B if self.sequence_balance else 1
            balance_loss = sequence_balance_loss(scores_TE.view(rows, -1, E), experts_TK.view(rows, -1, self.k))
        return Routing(
            experts_TK=experts_TK,
            weights_TK=weights_TK * self.scaling_factor,
            counts_E=visits(experts_TK, E),
            balance_loss=balance_loss,
        )
