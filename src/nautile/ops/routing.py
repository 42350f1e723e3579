"""From a router's scores to rows sorted by expert, and back.

    choose   experts_t = the K best of the scores of token t, perhaps within its best groups of experts
    permute  rows: each token once per chosen expert, sorted by expert
    combine  y_t = Σ_k w_tk · row(t, k)

T tokens, D model, E experts, K choices per token, G groups, R rows. Choice t·K + k is also called by that number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nautile.ops import group_layout, routing_nodes
from nautile.ops.checks import looks_at_values, same_device
from nautile.ops.dispatch import implementation

GroupScore = Literal["max", "top2_sum"]


def topk_gate(
    scores_TE: Tensor, k: int, n_group: int = 1, topk_group: int = 1, group_score: GroupScore = "max"
) -> Tensor:
    """The `k` experts of each token that score best, among those of its `topk_group` best groups.

    A group is E / n_group neighbouring experts. It scores what its best expert does (DeepSeek-V2, arXiv 2405.04434,
    §2.2.2), or its two best together (V3, arXiv 2412.19437, §2.1.2). Of equal scores the smaller index is better, for
    experts and for groups. Has no gradient.

    Args:
        scores_TE: float32 or float64, without NaN.
        k: At most E / n_group · topk_group.
        n_group: Divides E.
        topk_group: At most `n_group`; with all of them there is no limit.
        group_score: "max" or "top2_sum".

    Returns:
        int64 [T, K], best first.

    Raises:
        ValueError: Other shapes, dtypes or numbers.
    """
    if scores_TE.dim() != 2 or scores_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"topk_gate: scores must be float32 or float64 [T, E], got {scores_TE.dtype} {list(scores_TE.shape)}"
        )
    E = scores_TE.shape[1]
    if n_group < 1 or E % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_gate: cannot choose {topk_group} of {n_group} groups of {E} experts")
    allowed = E // n_group * topk_group
    if not 1 <= k <= allowed:
        raise ValueError(
            f"topk_gate: k must be in [1, {allowed}], the experts of {topk_group} of {n_group} groups of {E}, got {k}"
        )
    if group_score not in ("max", "top2_sum"):
        raise ValueError(f"topk_gate: group_score must be 'max' or 'top2_sum', got {group_score!r}")
    if group_score == "top2_sum" and topk_group < n_group == E:
        raise ValueError(f"topk_gate: groups of one expert have no two best: n_group is {n_group}, E is {E}")
    run = _run("topk_gate", scores_TE)
    return run(scores_TE.detach(), k, n_group, topk_group, group_score)


def _run(op: str, example: Tensor) -> Callable[..., Tensor]:
    return getattr(routing_nodes, op) if torch.compiler.is_compiling() else implementation(op, example)


@dataclass(frozen=True)
class RowMap:
    """Where each choice's row is. Both directions, so that neither permuting nor combining ever adds atomically."""

    choice_R: Tensor
    """int64: choice that a row belongs to, −1 for padding."""
    row_TK: Tensor
    """int64: row of a choice, −1 for a choice of no expert."""
    counts_E: Tensor
    """int64: rows of each expert."""
    ends_E: Tensor
    """int32: row after the last one of each expert, what `group_layout` calls ends."""


def row_map(experts_TK: Tensor, E: int, alignment: int = 1) -> RowMap:
    """Rows sorted by expert, then by token; every expert's begin at a multiple of `alignment`.

    Args:
        experts_TK: int64 in [0, E); −1 is a choice of no expert, which gets no row.
        E: How many experts.
        alignment: 128 for FP8 products, 1 for no padding.

    Returns:
        As many rows as the worst distribution of choices needs, so that no device is asked for a number: T·K without
        alignment, at most E · (alignment − 1) more with it.

    Raises:
        ValueError: Other shapes, dtypes, or experts, looked for where that is cheap.
    """
    if experts_TK.dim() != 2 or experts_TK.dtype != torch.int64:
        raise ValueError(f"row_map: experts must be int64 [T, K], got {experts_TK.dtype} {list(experts_TK.shape)}")
    if E < 1 or alignment < 1:
        raise ValueError(f"row_map: E and alignment must be positive, got {E} and {alignment}")
    if experts_TK.numel() and looks_at_values(experts_TK):
        low, high = experts_TK.aminmax()
        if low < -1 or high >= E:
            raise ValueError(f"row_map: experts must lie in [0, {E}), or be -1, got {int(low)} to {int(high)}")
    T, K = experts_TK.shape
    choice = experts_TK.flatten()
    choice = torch.where(choice < 0, E, choice)  # sorted behind all experts
    counts_E = choice.new_zeros(E + 1).scatter_add_(0, choice, torch.ones_like(choice))
    ends_E = group_layout.ends_of(counts_E[:E], alignment)
    R = (T * K + min(E, T * K) * (alignment - 1)) // alignment * alignment
    order = choice.argsort(stable=True)
    # What padding adds to the place that sorting alone gives.
    shift_E = torch.cat([ends_E, ends_E.new_zeros(1)]) - counts_E.cumsum(0)
    row = torch.arange(T * K, device=choice.device) + shift_E[choice[order]]
    none = choice[order] == E
    choice_R = choice.new_full((R + 1,), -1).scatter_(0, row.masked_fill(none, R), order)[:R]
    row_TK = torch.empty_like(choice).scatter_(0, order, row.masked_fill(none, -1)).view(T, K)
    return RowMap(choice_R, row_TK, counts_E[:E], ends_E)


def permute_tokens(x_TD: Tensor, rows: RowMap) -> Tensor:
    """Each token once per choice, in the order of `rows`; padding is 0.

    Differentiable: the gradient of a token is the sum over its rows, in the order of its choices. Numbers of any dtype
    are moved, FP8 and its scales too.

    Returns:
        [R, D].

    Raises:
        ValueError: `x_TD` has another number of tokens than `rows`.
    """
    if x_TD.dim() != 2 or x_TD.shape[0] != rows.row_TK.shape[0]:
        raise ValueError(f"permute_tokens: x must be [T, D] with T = {rows.row_TK.shape[0]}, got {list(x_TD.shape)}")
    same_device("permute_tokens", x=x_TD, rows=rows.row_TK)
    if x_TD.dtype.itemsize == 1:
        return implementation("permute_tokens", x_TD)(x_TD.view(torch.uint8), rows.choice_R, rows.row_TK).view(
            x_TD.dtype
        )
    return _run("permute_tokens", x_TD)(x_TD, rows.choice_R, rows.row_TK)


def combine_tokens(y_RD: Tensor, rows: RowMap, weights_TK: Tensor | None = None) -> Tensor:
    """``y_t = Σ_k w_tk · y_row(t, k)``, added in the order of the choices, in float32 or better.

    Differentiable in `y_RD` and the weights. Padding rows may hold anything; a token without choices gets 0.

    Args:
        y_RD: Results of the experts, in the rows that `permute_tokens` gave them.
        rows: The same as there.
        weights_TK: float32, or float64 beside float64; without them, every row counts once.

    Returns:
        [T, D] in the dtype of `y_RD`.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    R = rows.choice_R.shape[0]
    if y_RD.dim() != 2 or y_RD.shape[0] != R or not y_RD.is_floating_point():
        raise ValueError(f"combine_tokens: y must be floats [R, D] with R = {R}, got {y_RD.dtype} {list(y_RD.shape)}")
    wide = torch.float64 if y_RD.dtype == torch.float64 else torch.float32
    if weights_TK is not None and (weights_TK.shape != rows.row_TK.shape or weights_TK.dtype != wide):
        raise ValueError(
            f"combine_tokens: weights must be {wide} {list(rows.row_TK.shape)}, "
            f"got {weights_TK.dtype} {list(weights_TK.shape)}"
        )
    same_device("combine_tokens", y=y_RD, weights=weights_TK, rows=rows.row_TK)
    return _run("combine_tokens", y_RD)(y_RD, rows.choice_R, rows.row_TK, weights_TK)
