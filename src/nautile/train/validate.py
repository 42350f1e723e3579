"""Held-out loss in bits per byte, which does not depend on the tokenizer: text that is cut finer is not easier."""

import math

import torch

from nautile import ops
from nautile.core.context import ForwardContext, IndexStage
from nautile.data.loader import count_windows, sequential_windows
from nautile.data.shards import TokenShards
from nautile.models.causal_lm import CausalLM
from nautile.train.precision import autocast


def windows_within(shards: TokenShards, sequence_length: int, tokens: int) -> int:
    """Windows to score for about so many tokens: whole ones, at least one, at most what the split holds."""
    return min(max(1, tokens // sequence_length), count_windows(shards, sequence_length + 1))


@torch.no_grad()
def bits_per_byte(
    model: CausalLM,
    shards: TokenShards,
    sequence_length: int,
    tokens: int,
    precision: str = "fp32",
    separate_documents: bool = False,
    index_stage: IndexStage | None = None,
) -> float:
    """Σ −log2 P(token) / Σ bytes over the first tokens of the split. Special tokens cost bits, but hold no bytes.

    Every token is predicted at most once, from what stands before it in its window, so a longer window does better.

    Args:
        model: Put into eval mode meanwhile, and into training mode afterwards.
        shards: The validation split.
        sequence_length: Inputs per window.
        tokens: About how many tokens to predict: whole windows, at least one.
        precision: As in training.
        separate_documents: As in training.
        index_stage: As in training: what a V3.2 model's attention reads at this stage. None for what indexers select.

    Raises:
        UserError: the split does not fill one window.
    """
    device = model.lm_head.weight.device
    nats, scored_bytes = 0.0, 0
    model.eval()
    windows = windows_within(shards, sequence_length, tokens)
    for batch in sequential_windows(shards, sequence_length + 1, limit=windows):
        tokens_BW = batch.tokens_BW.to(device)
        cu_seqlens = batch.cu_seqlens.to(device) if separate_documents else None
        targets_T = tokens_BW[:, 1:].reshape(-1)
        with autocast(precision, device):
            ctx = ForwardContext.for_tokens(tokens_BW[:, :-1], cu_seqlens, index_stage)
            hidden_BSD = model.hidden(ctx).hidden_BSD
            nats += ops.linear_cross_entropy(hidden_BSD.flatten(0, 1), model.lm_head.weight, targets_T).item()
        scored_bytes += shards.count_bytes(targets_T.cpu().numpy())
    model.train()
    return nats / math.log(2) / max(scored_bytes, 1)
