"""What `routing` puts into a compiler's graph: one node per op, which runs what an eager call does.

Inlined, the references would run instead: they sort all experts, and the gradients of what they gather are added
atomically on a GPU. The backward is made of the same nodes, and of arithmetic that the compiler fuses.
"""

from typing import Any

import torch
from torch import Tensor

from nautile.ops.dispatch import implementation


@torch.library.custom_op("nautile::topk_gate", mutates_args=())
def topk_gate(scores_TE: Tensor, k: int, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """See `nautile.ops.topk_gate`."""
    return implementation("topk_gate", scores_TE)(scores_TE, k, n_group, topk_group, group_score).contiguous()


@topk_gate.register_fake
def _(scores_TE: Tensor, k: int, n_group: int, topk_group: int, group_score: str) -> Tensor:
    return scores_TE.new_empty(scores_TE.shape[0], k, dtype=torch.int64)


@torch.library.custom_op("nautile::permute_tokens", mutates_args=())
def permute_tokens(x_TD: Tensor, choice_R: Tensor, row_TK: Tensor) -> Tensor:
    """See `nautile.ops.permute_tokens`."""
    return implementation("permute_tokens", x_TD)(x_TD, choice_R, row_TK)


@permute_tokens.register_fake
def _(x_TD: Tensor, choice_R: Tensor, row_TK: Tensor) -> Tensor:
    return x_TD.new_empty(choice_R.shape[0], x_TD.shape[1])


@torch.library.custom_op("nautile::combine_tokens", mutates_args=())
def combine_tokens(y_RD: Tensor, choice_R: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """See `nautile.ops.combine_tokens`."""
    return implementation("combine_tokens", y_RD)(y_RD, choice_R, row_TK, weights_TK).contiguous()


@combine_tokens.register_fake
def _(y_RD: Tensor, choice_R: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    return y_RD.new_empty(row_TK.shape[0], y_RD.shape[1])


def _save_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _permute_backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
    choice_R, row_TK = ctx.saved_tensors
    return combine_tokens(grad_RD, choice_R, row_TK, None), None, None


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
    y_RD, choice_R, row_TK, weights_TK = ctx.saved_tensors
    grad_RD = permute_tokens(grad_TD, choice_R, row_TK)
    if weights_TK is None or not len(choice_R):
        return grad_RD, None, None, None if weights_TK is None else torch.zeros_like(weights_TK)
    weight_R = torch.where(choice_R < 0, 0, weights_TK.flatten()[choice_R.clamp(min=0)])
    wide = weights_TK.dtype
    dot_R = (grad_RD.to(wide) * y_RD.to(wide)).sum(-1)
    grad_TK = torch.where(row_TK < 0, 0, dot_R[row_TK.clamp(min=0)])
    return (grad_RD.to(wide) * weight_R[:, None]).to(y_RD.dtype), None, None, grad_TK


permute_tokens.register_autograd(_permute_backward, setup_context=_save_map)
combine_tokens.register_autograd(_combine_backward, setup_context=_save_rows)
