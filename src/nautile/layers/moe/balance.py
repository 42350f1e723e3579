"""Keeping the experts' load even: the bias update (V3 §2.1.2) and the sequence-wise loss (V3 eq. 17-20)."""

import torch
from torch import Tensor


@torch.no_grad()
def update_bias_(bias_E: Tensor, counts_E: Tensor, speed: float) -> None:
    """Auxiliary-loss-free balancing, in place: b_i += speed · sign(mean load − load_i).

    Args:
        bias_E: float32 [E], a router's `e_score_correction_bias`.
        counts_E: [E], tokens per expert over the whole batch of the step: summed over micro-batches and ranks.
        speed: γ in the paper, 0.001 for most of V3's training.
    """
    load_E = counts_E.to(bias_E.dtype)
    bias_E += speed * torch.sign(load_E.mean() - load_E)


def sequence_balance_loss(scores_BSE: Tensor, experts_BSK: Tensor) -> Tensor:
    """Σ_i f_i·P_i per sequence, averaged over the batch; without the factor α. 1 at perfect balance.

    f_i = E/(K·S)·(tokens of the sequence that visit i) carries no gradient; P_i is the mean over the sequence of
    s_i/Σ_j s_j. Equation 18 counts the top K of the plain scores; the tokens that really visit i, bias and group
    limits included, are counted here, since that is the load to be balanced.

    Args:
        scores_BSE: float32 affinities of every expert.
        experts_BSK: int64 chosen experts.
    """
    B, S, E = scores_BSE.shape
    K = experts_BSK.shape[-1]
    visits_BE = scores_BSE.new_zeros(B, E)
    visits_BE.scatter_add_(1, experts_BSK.reshape(B, S * K), scores_BSE.new_ones(1, 1).expand(B, S * K))
    f_BE = visits_BE * (E / (K * S))
    P_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True)).mean(1)
    return (f_BE * P_BE).sum(-1).mean()
