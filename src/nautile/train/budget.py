"""How many steps fit into a given time on this machine: measured, not guessed."""

import statistics
import time
from dataclasses import replace

from nautile.data.prepare import PreparedData
from nautile.train.optim import clip_gradient_
from nautile.train.precision import resolve_device, resolve_precision
from nautile.train.pretrain import accumulate_gradients
from nautile.train.recipe import PretrainRecipe
from nautile.train.schedule import settings_at
from nautile.train.state import new_state


def seconds_per_step(recipe: PretrainRecipe, data: PreparedData, steps: int = 5) -> float:
    """Median time of a few optimiser steps of `recipe` on throw-away weights, after one to warm up."""
    device, _ = resolve_device(recipe.train.device)
    precision, _ = resolve_precision(recipe.train.precision, device)
    recipe = replace(recipe, train=replace(recipe.train, precision=precision))
    state = new_state(recipe, data, device)
    seconds = []
    for step in range(1 + steps):
        started = time.perf_counter()
        accumulate_gradients(recipe, state, device, settings_at(recipe, step))
        clip_gradient_(state.model.parameters(), recipe.optim.clip_norm).item()  # waits for an accelerator
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def steps_within(seconds: float, seconds_per_step: float, least: int, most: int) -> int:
    """Steps that take about so long, in tens, between `least` and `most`."""
    return min(max(int(seconds / seconds_per_step) // 10 * 10, least), most)
