"""Specification of expert selection, and of the rows of tokens that go to experts."""

from typing import Any

import torch
from torch import Tensor

from nautile.ops.precision import accumulate_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain torch runs everywhere."""
    return None


def topk_gate(scores_TE: Tensor, k: int, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """See `nautile.ops.topk_gate`."""
    if topk_group < n_group:
        group_TG = group_scores(scores_TE, n_group, group_score)
        scores_TE = keep_groups(scores_TE, best(group_TG, topk_group), n_group)
    return best(scores_TE, k)


def best(scores: Tensor, k: int) -> Tensor:
    """int64 [..., k]: places of the k largest of the last dimension, of equal ones the first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def group_scores(scores_TE: Tensor, n_group: int, group_score: str) -> Tensor:
    """[T, G]: the best of each group of experts, or the sum of its two best."""
    scores_TGM = scores_TE.unflatten(1, (n_group, -1))
    return scores_TGM.amax(-1) if group_score == "max" else scores_TGM.topk(2, dim=-1).values.sum(-1)


def keep_groups(scores_TE: Tensor, groups_TX: Tensor, n_group: int) -> Tensor:
    """−∞ for experts outside of these groups. Not 0: a bias makes scores negative, and 0 would win."""
    dropped_TG = torch.ones(len(scores_TE), n_group, dtype=torch.bool, device=scores_TE.device)
    dropped_TG.scatter_(1, groups_TX, False)
    return scores_TE.masked_fill(dropped_TG.repeat_interleave(scores_TE.shape[1] // n_group, 1), float("-inf"))


def permute_tokens(x_TD: Tensor, choice_R: Tensor, row_TK: Tensor) -> Tensor:
    """See `nautile.ops.permute_tokens`."""
    return _Permute.apply(x_TD, choice_R, row_TK) if x_TD.is_floating_point() else _spread(x_TD, choice_R, row_TK)


def _spread(x_TD: Tensor, choice_R: Tensor, row_TK: Tensor) -> Tensor:
    token_R = choice_R.clamp(min=0).div(row_TK.shape[1], rounding_mode="floor")
    return torch.where(choice_R[:, None] < 0, x_TD.new_zeros(()), x_TD[token_R])


class _Permute(torch.autograd.Function):
    """Gathers in the backward pass, too: torch's own gradient of a gather adds in any order if it has several threads,
    and equal seeds would no longer mean equal losses.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, choice_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(choice_R, row_TK)
        return _spread(x_TD, choice_R, row_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        choice_R, row_TK = ctx.saved_tensors
        return combine_tokens(grads[0], choice_R, row_TK, None), None, None


def combine_tokens(y_RD: Tensor, choice_R: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """See `nautile.ops.combine_tokens`."""
    wide = accumulate_dtype(y_RD)
    zero = torch.zeros((), dtype=wide, device=y_RD.device)
    total_TD = zero.expand(len(row_TK), y_RD.shape[1])
    if not len(y_RD):
        total_TD = total_TD + y_RD.sum(0).to(wide)  # no rows: 0, which keeps y and the weights in autograd's graph
        if weights_TK is not None:
            total_TD = total_TD + weights_TK.sum()
    else:
        for k, row_T in enumerate(row_TK.unbind(1)):
            missing_T = row_T < 0
            # Both factors: what stands in their place may be NaN, and so would be the other's gradient.
            part_TD = torch.where(missing_T[:, None], zero, y_RD[row_T.clamp(min=0)].to(wide))
            if weights_TK is not None:
                part_TD = part_TD * torch.where(missing_T, zero, weights_TK[:, k])[:, None]
            total_TD = total_TD + part_TD
    return total_TD.to(y_RD.dtype)
