"""AdamW over the model's parameters: which of them decay, and the learning rate of a step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nautile.models.causal_lm import CausalLM
from nautile.train.recipe import OptimConfig


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to every matrix (projections, experts, router, embedding, head).

    Vectors are left alone: a norm gain multiplies whatever the matrices produce, so pulling it to 0 only rescales.
    V3 publishes the decay 0.1 and no list; this is the rule of Megatron-style trainers. The router's correction bias is
    a buffer, outside the optimiser altogether.
    """
    return parameter.ndim >= 2


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with two groups, matrices with decay and vectors without, in the order of `named_parameters`."""
    parameters = [p for _, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if decays(p)], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]
    # One kernel for the whole update: on CPUs it reads and writes each of the four tensors once instead of ~10 times.
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def train_only_indexers_(model: CausalLM, only: bool) -> None:
    """Freeze all else, or nothing. A frozen parameter gets no gradient, and AdamW leaves alone what has none."""
    theirs = {id(parameter) for parameter in model.indexer_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(not only or id(parameter) in theirs)


def clip_gradients_(model: CausalLM, max_norm: float) -> tuple[Tensor, Tensor | None]:
    """Clip the gradient of the indexers, which is another loss's, apart from that of the rest.

    Returns:
        The norms before: of the rest, and of the indexers, None without any. A part without gradient has norm 0.
    """
    indexers = model.indexer_parameters()
    theirs = {id(parameter) for parameter in indexers}
    rest = clip_gradient_([p for p in model.parameters() if id(p) not in theirs], max_norm)
    return rest, clip_gradient_(indexers, max_norm) if indexers else None


def clip_gradient_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the whole gradient to at most `max_norm`, in place; return the norm before. Scalar float32."""
    return nn.utils.clip_grad_norm_(parameters, max_norm)
