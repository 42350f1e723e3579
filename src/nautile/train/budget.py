"""How fast this machine trains a recipe: measured before the run, so that automatic choices have a reason."""

import math
import statistics
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import torch

from nautile.data.prepare import PreparedData
from nautile.train.optim import clip_gradient_
from nautile.train.precision import resolve_device, resolve_precision
from nautile.train.pretrain import accumulate_gradients
from nautile.train.recipe import PretrainRecipe
from nautile.train.schedule import settings_at
from nautile.train.state import new_state


def seconds_per_step(
    recipe: PretrainRecipe, data: PreparedData, threads: int, too_slow: float = math.inf, steps: int = 3
) -> float:
    """Median time of a few optimiser steps of `recipe` on throw-away weights, after one to warm up.

    A step that takes longer than `too_slow` seconds ends the measurement: it is the answer then.
    """
    device, _ = resolve_device(recipe.train.device)
    precision, _ = resolve_precision(recipe.train.precision, device)
    recipe = replace(recipe, train=replace(recipe.train, precision=precision))
    state = new_state(recipe, data, device)
    seconds = []
    with cpu_threads(threads):
        for step in range(1 + steps):
            started = time.perf_counter()
            accumulate_gradients(recipe, state, device, settings_at(recipe, step))
            clip_gradient_(state.model.parameters(), recipe.optim.clip_norm).item()  # waits for an accelerator
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - started)
            if seconds[-1] > too_slow:
                return seconds[-1]
    return statistics.median(seconds[1:])


def fastest_threads(recipe: PretrainRecipe, data: PreparedData) -> tuple[int, float, str]:
    """One thread per core or one alone, whichever trains faster right now; its seconds per step; the reason.

    Where another program keeps a core busy, every operation waits for the thread that shares it: two threads can then
    be many times slower than one (docs/log.md).
    """
    cores = torch.get_num_threads()
    if cores == 1:
        return 1, seconds_per_step(recipe, data, 1), "there is one core"
    alone = seconds_per_step(recipe, data, 1)
    together = seconds_per_step(recipe, data, cores, too_slow=2 + 2 * alone)  # the first step also builds kernels
    if alone < together:
        return 1, alone, f"a step takes {alone:.2f} s with one and {together:.2f} s with {cores}: other work is running"
    return cores, together, f"a step takes {together:.2f} s, with one {alone:.2f} s"


def steps_within(seconds: float, seconds_per_step: float, least: int, most: int) -> int:
    """Steps that take about so long, in tens, between `least` and `most`."""
    return min(max(int(seconds / seconds_per_step) // 10 * 10, least), most)


@contextmanager
def cpu_threads(threads: int) -> Generator[None]:
    """So many CPU threads per operation inside, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
