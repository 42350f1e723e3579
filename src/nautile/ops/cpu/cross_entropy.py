"""Chunked cross-entropy whose forward also computes the gradients, so logits live for one chunk only.

Two grains, since two caches: matrix products run on `chunk` tokens, where they are efficient, in buffers that stay
below the 32 MiB from which glibc returns memory to the system after each use (and page faults cost more than the
softmax); element-wise work runs on `_ROWS` tokens, whose logits in float32 stay in the cache.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.cross_entropy import IGNORE
from nautile.ops.precision import accumulate_dtype, compute_dtype, no_autocast

__all__ = ["linear_cross_entropy", "why_not"]

_ROWS = 64


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
    """See `nautile.ops.linear_cross_entropy`."""
    return _LinearCrossEntropy.apply(x_TD, weight_VD, targets_T, chunk, compute_dtype(x_TD))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        wide = accumulate_dtype(x_TD)
        x, weight = x_TD.to(dtype), weight_VD.to(dtype)
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = torch.zeros(weight.shape, dtype=wide) if need_weight else None
        total = torch.zeros((), dtype=wide)
        buffer = torch.empty(min(chunk, x.shape[0]), weight.shape[0], dtype=dtype)
        with no_autocast(x):
            for start in range(0, x.shape[0], chunk):
                piece = slice(start, start + chunk)
                x_piece = x[piece]
                logits = torch.mm(x_piece, weight.t(), out=buffer[: x_piece.shape[0]])
                total += _nll_and_gradient_(logits, targets_T[piece], wide, need_x or need_weight)
                if grad_x is not None:
                    torch.mm(logits, weight, out=grad_x[piece])
                if grad_weight is not None:
                    _add_(grad_weight, torch.mm(logits.t(), x_piece))
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtypes = x_TD.dtype, weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        return (
            None if grad_x is None else (grad_x * grad).to(x_dtype),
            None if grad_weight is None else (grad_weight * grad).to(weight_dtype),
            None,
            None,
            None,
        )


def _add_(total_VD: Tensor, part_VD: Tensor) -> None:
    """total += part, slice by slice: adding two dtypes makes a wide copy of the narrow one, which should be small."""
    for total, part in zip(total_VD.split(1024), part_VD.split(1024), strict=True):
        total += part


def _nll_and_gradient_(logits_TV: Tensor, targets_T: Tensor, wide: torch.dtype, need_gradient: bool) -> Tensor:
    """Sum of −log p(target) over the counted rows; `logits_TV` becomes its own gradient, softmax − one-hot."""
    total = torch.zeros((), dtype=wide)
    size = min(_ROWS, logits_TV.shape[0])
    wide_logits = torch.empty(size, logits_TV.shape[1], dtype=wide)
    probabilities = torch.empty_like(wide_logits)
    for start in range(0, logits_TV.shape[0], size):
        logits, targets = logits_TV[start : start + size], targets_T[start : start + size]
        scores, p = wide_logits[: logits.shape[0]], probabilities[: logits.shape[0]]
        torch.softmax(scores.copy_(logits), 1, out=p)
        ignored = targets == IGNORE
        target = targets.masked_fill(ignored, 0).unsqueeze(1)
        # log Σ exp = highest − log p(highest): exact, since the largest probability is at least 1 / V.
        nll = scores.amax(1) - p.amax(1).log_() - scores.gather(1, target).squeeze(1)
        total += nll.masked_fill_(ignored, 0).sum()
        if need_gradient:
            p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
            if ignored.any():
                p[ignored] = 0
            logits.copy_(p)
    return total
