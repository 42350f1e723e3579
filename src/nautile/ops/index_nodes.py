"""Scores, selection and loss of an indexer as nodes of a compiler's graph, which run what eager calls do.

Traced instead, their references would be inlined, which hold a number for every query, position and head at once.

B sequences, S queries, T rows, J indexer heads, I dimensions, H heads and Q dimensions of the main attention, K rows.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nautile.ops.blocked_kl import kl_and_gradients
from nautile.ops.dispatch import implementation
from nautile.ops.precision import accumulate_dtype


@torch.library.custom_op("nautile::index_scores", mutates_args=())
def scores_node(q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor) -> Tensor:
    """See `nautile.ops.index_scores`."""
    return implementation("index_scores", q_BSJI)(q_BSJI, k_BTI, weights_BSJ).contiguous()


@scores_node.register_fake
def _(q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor) -> Tensor:
    return q_BSJI.new_empty(*q_BSJI.shape[:2], k_BTI.shape[1], dtype=accumulate_dtype(q_BSJI))


@torch.library.custom_op("nautile::index_scores_backward", mutates_args=())
def scores_backward_node(
    q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor, grad_BST: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three, in their dtypes."""
    inputs = (q_BSJI, k_BTI, weights_BSJ)
    grads = _module("index_scores", q_BSJI).score_gradients(*inputs, grad_BST)
    # Contiguous, as the fake says: some backends give a gradient the strides of its input.
    return tuple(grad.to(x.dtype).contiguous() for grad, x in zip(grads, inputs, strict=True))  # pyrefly: ignore


@scores_backward_node.register_fake
def _(q_BSJI: Tensor, k_BTI: Tensor, weights_BSJ: Tensor, grad_BST: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q_BSJI, k_BTI, weights_BSJ))  # pyrefly: ignore


def _keep_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _scores_backward(ctx: Any, grad_BST: Tensor) -> tuple[Tensor, ...]:
    return scores_backward_node(*ctx.saved_tensors, grad_BST)


scores_node.register_autograd(_scores_backward, setup_context=_keep_inputs)


@torch.library.custom_op("nautile::top_rows", mutates_args=())
def top_rows_node(scores_BST: Tensor, seen_BST: Tensor, k: int) -> Tensor:
    """See `nautile.ops.top_rows`."""
    return implementation("top_rows", scores_BST)(scores_BST, seen_BST, k).contiguous()


@top_rows_node.register_fake
def _(scores_BST: Tensor, seen_BST: Tensor, k: int) -> Tensor:
    B, S, T = scores_BST.shape
    return scores_BST.new_empty(B, S, min(k, T), dtype=torch.int64)


@torch.library.custom_op("nautile::indexer_kl", mutates_args=())
def kl_node(
    index_q_BSJI: Tensor,
    index_k_BSI: Tensor,
    weights_BSJ: Tensor,
    q_BSHQ: Tensor,
    k_BSHQ: Tensor,
    scale: float,
    selected_BSS: Tensor | None,
    document_ids_BS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients for the first three."""
    inputs = (index_q_BSJI, index_k_BSI, weights_BSJ)
    parts = _module("indexer_kl", index_q_BSJI).parts()
    rest = (q_BSHQ, k_BSHQ, scale, selected_BSS, document_ids_BS)
    loss, grads = kl_and_gradients(*inputs, *rest, parts, wanted=True)
    return loss, *(grad.to(x.dtype).contiguous() for grad, x in zip(grads, inputs, strict=True))  # pyrefly: ignore


@kl_node.register_fake
def _(
    index_q_BSJI: Tensor,
    index_k_BSI: Tensor,
    weights_BSJ: Tensor,
    q_BSHQ: Tensor,
    k_BSHQ: Tensor,
    scale: float,
    selected_BSS: Tensor | None,
    document_ids_BS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (x.new_empty(x.shape) for x in (index_q_BSJI, index_k_BSI, weights_BSJ))
    return index_q_BSJI.new_empty((), dtype=accumulate_dtype(index_q_BSJI)), *grads  # pyrefly: ignore


def _keep_gradients(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _kl_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *((grad * g).to(g.dtype) for g in ctx.saved_tensors), *(None,) * 5


kl_node.register_autograd(_kl_backward, setup_context=_keep_gradients)


def _module(op: str, example: Tensor) -> ModuleType:
    """Where the implementation of `op` stands, which has its gradients beside it."""
    return import_module(implementation(op, example).__module__)
