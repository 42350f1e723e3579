"""Chunked cross-entropy whose forward also computes the gradients, so logits live for one chunk only."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautile.ops.cpu.support import floats_on_cpu as why_not
from nautile.ops.cross_entropy import IGNORE
from nautile.ops.precision import accumulate_dtype, compute_dtype, no_autocast

__all__ = ["linear_cross_entropy", "why_not"]


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
    """See `nautile.ops.linear_cross_entropy`."""
    return _LinearCrossEntropy.apply(x_TD, weight_VD, targets_T, chunk, compute_dtype(x_TD))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        wide = accumulate_dtype(x_TD)
        weight = weight_VD.to(dtype)
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty(x_TD.shape, dtype=dtype) if need_x else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=wide) if need_weight else None
        total = torch.zeros((), dtype=wide)
        with no_autocast(x_TD):
            for start in range(0, x_TD.shape[0], chunk):
                piece = slice(start, start + chunk)
                x, targets = x_TD[piece].to(dtype), targets_T[piece]
                p = torch.mm(x, weight.t()).to(wide)
                counted = targets != IGNORE
                where = targets.masked_fill(~counted, 0).unsqueeze(1)
                score, highest = p.gather(1, where), p.amax(1, keepdim=True)
                p = torch.softmax(p, 1)
                # log Σ exp = highest − log p(highest): exact, since the largest probability is at least 1 / V.
                nll = (highest - p.amax(1, keepdim=True).log_() - score).squeeze(1)
                total += nll.masked_fill(~counted, 0).sum()
                if grad_x is None and grad_weight is None:
                    continue
                p.scatter_add_(1, where, torch.full_like(score, -1.0))
                if not counted.all():
                    p *= counted.unsqueeze(1)
                grad_logits = p.to(dtype)
                if grad_x is not None:
                    torch.mm(grad_logits, weight, out=grad_x[piece])
                if grad_weight is not None:
                    grad_weight += torch.mm(grad_logits.t(), x)
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
