"""How many steps fit into a given time on this machine: measured, not guessed."""

import statistics
import time

import torch

from nautile.data.prepare import PreparedData
from nautile.train.losses import pretrain_loss
from nautile.train.optim import clip_gradient_
from nautile.train.precision import autocast, resolve_device, resolve_precision
from nautile.train.recipe import PretrainRecipe
from nautile.train.state import new_state


def seconds_per_step(recipe: PretrainRecipe, data: PreparedData, steps: int = 4) -> float:
    """Median time of a few optimiser steps of `recipe` on throw-away weights, after one to warm up."""
    device, _ = resolve_device(recipe.train.device)
    precision, _ = resolve_precision(recipe.train.precision, device)
    state = new_state(recipe, data, device)
    micro_batches = recipe.train.batch_size // (recipe.train.micro_batch_size or recipe.train.batch_size)
    seconds = []
    for _ in range(1 + steps):
        started = time.perf_counter()
        for _ in range(micro_batches):
            tokens_BW = next(state.loader).tokens_BW.to(device)
            with autocast(precision, device):
                losses = pretrain_loss(state.model, tokens_BW, recipe.mtp.weight, recipe.balance.alpha)
            losses.total.backward()
        clip_gradient_(state.model.parameters(), recipe.optim.clip_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def steps_within(seconds: float, seconds_per_step: float, least: int, most: int) -> int:
    """Steps that take about so long, in tens, between `least` and `most`."""
    return min(max(int(seconds / seconds_per_step) // 10 * 10, least), most)
