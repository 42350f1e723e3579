"""The training loss of DeepSeek-V3: next token, multi-token prediction, sequence-wise balance.

    L = L_main + λ/D · Σ_k L_k + α · Σ_layers L_bal + ω · Σ_layers L_I          (V3 paper eq. 24-25 and 17-20)

L_k = −(1/T) Σ log P(t_{i+1+k}): like the paper it divides by all T positions of a sequence, although module k has no
target at the last k of them. L_I is the loss of a V3.2 model's indexers (V3.2-Exp eq. 3 and 4), per token; its gradient
reaches nothing but them, and that of the rest does not reach them.

Letters: B sequences, S tokens each, W = S + 1 tokens of the training window, D model width, T = B·S, E experts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nautile import ops
from nautile.core.context import ForwardContext, IndexStage
from nautile.models.causal_lm import CausalLM


@dataclass(frozen=True)
class Losses:
    """Losses of one batch in nats per token, and the experts' load."""

    total: Tensor
    """Scalar to differentiate."""
    main: Tensor
    """Scalar, detached: next-token cross-entropy."""
    mtp: Tensor
    """[depths], detached: L_k of each MTP module; empty without MTP."""
    balance: Tensor
    """Scalar, detached: Σ over the MoE layers, without α."""
    index: Tensor
    """Scalar, detached: Σ over the indexers in nats per token, without ω; 0 where none is trained."""
    counts: tuple[Tensor, ...]
    """int64 [E] per router, in the order of `model.routers()`: tokens that chose each expert."""

    def detached(self) -> "Losses":
        """The same figures without the graph behind `total`."""
        return replace(self, total=self.total.detach())


def pretrain_loss(
    model: CausalLM,
    tokens_BW: Tensor,
    mtp_weight: float,
    balance_alpha: float,
    cu_seqlens: Tensor | None = None,
    index_weight: float = 1.0,
    index_stage: IndexStage | None = None,
) -> Losses:
    """Forward pass and loss of a window of tokens.

    Args:
        tokens_BW: int64 [B, S + 1]; position i is trained to predict entry i + 1.
        mtp_weight: λ.
        balance_alpha: α.
        cu_seqlens: Document starts in the flattened [B·S] input; None lets attention cross documents, as V3 does.
        index_weight: ω.
        index_stage: What attention behind indexers reads, and whether they learn; of no meaning without indexers.
    """
    ctx = ForwardContext.for_tokens(tokens_BW[:, :-1], cu_seqlens, index_stage)
    output = model.hidden(ctx)
    main = cross_entropy_per_position(model, output.hidden_BSD, tokens_BW, ahead=1)

    modules = model.predict_ahead(output.hidden_BSD, tokens_BW, ctx) if len(model.mtp) else []
    mtp = [cross_entropy_per_position(model, m.hidden_BSD, tokens_BW, ahead=k + 1) for k, m in enumerate(modules, 1)]

    routing = [*output.routing, *(r for m in modules for r in m.routing)]
    balance = sum((r.balance_loss for r in routing if r.balance_loss is not None), start=main.new_zeros(()))

    index_losses = [*output.index_losses, *(loss for m in modules for loss in m.index_losses)]
    index = sum(index_losses, start=main.new_zeros(()))

    total = main + balance_alpha * balance
    if index_losses:
        total = total + index_weight * index
    if mtp:
        total = total + mtp_weight / len(mtp) * sum(mtp)
    return Losses(
        total=total,
        main=main.detach(),
        mtp=torch.stack(mtp).detach() if mtp else main.new_zeros(0),
        balance=balance.detach(),
        index=index.detach(),
        counts=tuple(r.counts_E for r in routing),
    )


def cross_entropy_per_position(model: CausalLM, hidden_BSD: Tensor, tokens_BW: Tensor, ahead: int) -> Tensor:
    """−(1/T) Σ log P(t_{i+ahead} | position i), over the positions that have such a token in the window."""
    targets = tokens_BW[:, ahead:]
    positions = targets.shape[1]
    hidden_TD = hidden_BSD[:, :positions].reshape(-1, hidden_BSD.shape[-1])
    total = ops.linear_cross_entropy(hidden_TD, model.lm_head.weight, targets.reshape(-1))
    return total / (tokens_BW.shape[0] * (tokens_BW.shape[1] - 1))
