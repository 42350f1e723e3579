"""Everything a training run carries from step to step."""

from dataclasses import dataclass

import torch

from nautile.data.loader import Loader
from nautile.data.prepare import PreparedData
from nautile.models.causal_lm import CausalLM
from nautile.models.family import build_model
from nautile.train.optim import build_optimizer
from nautile.train.precision import prepare_model_
from nautile.train.recipe import PretrainRecipe


@dataclass
class TrainState:
    """Model, optimiser, position in the data, and how far the run is. `checkpoint.py` saves and restores it."""

    model: CausalLM
    optimizer: torch.optim.AdamW
    loader: Loader
    step: int = 0
    """Optimiser steps done."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Time spent in the run so far, interruptions left out."""


def new_state(recipe: PretrainRecipe, data: PreparedData, device: torch.device) -> TrainState:
    """The state before the first step: initial weights and the first sample, both decided by the recipe's seed."""
    # Drawn on the CPU, so that a seed means the same weights on every device.
    model = build_model(recipe.model)
    model.init_weights(torch.Generator().manual_seed(recipe.seed))
    model.to(device).train()
    prepare_model_(model, recipe.train.precision)
    return TrainState(
        model=model,
        optimizer=build_optimizer(model.named_parameters(), recipe.optim),
        loader=Loader(
            data.train,
            batch_size=recipe.train.micro_batch_size or recipe.train.batch_size,
            window=recipe.train.sequence_length + 1,
            seed=recipe.seed,
        ),
    )
