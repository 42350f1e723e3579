"""What changes over a run: learning rate, weight of the MTP loss, speed of the bias update.

Steps count from 0 to total − 1. The schedules are pure functions of the step, so a resumed run needs no state for them.
DeepSeek-V3 paper §4.2; DeepSeek-V2 paper §3.1.2; DeepSeekMoE paper §4.1.
"""

import math
from dataclasses import dataclass

from nautile.core.context import IndexStage
from nautile.models.deepseek_v32.config import DeepseekV32Config
from nautile.train.recipe import BalanceConfig, IndexerConfig, MtpConfig, PretrainRecipe, ScheduleConfig


@dataclass(frozen=True)
class StepSettings:
    """The scheduled quantities of one step."""

    lr: float
    mtp_weight: float
    """λ"""
    bias_speed: float
    """γ"""
    index_stage: IndexStage | None = None
    """What a V3.2 model's attention reads and whether its indexers learn; None for a model without indexers."""


def settings_at(recipe: PretrainRecipe, step: int) -> StepSettings:
    """All scheduled quantities of this step."""
    place = step / recipe.train.steps
    stage = index_stage(recipe.indexer, place) if isinstance(recipe.model, DeepseekV32Config) else None
    warming_up = stage == "warmup"  # nothing moves but the indexers, at a rate of their own
    shaped = recipe.optim.lr * learning_rate_factor(recipe.schedule, step, recipe.train.steps)
    return StepSettings(
        lr=recipe.indexer.warmup_lr if warming_up else shaped,
        mtp_weight=mtp_weight(recipe.mtp, place),
        bias_speed=0.0 if warming_up else bias_speed(recipe.balance, place),
        index_stage=stage,
    )


def learning_rate_factor(schedule: ScheduleConfig, step: int, total: int) -> float:
    """Learning rate of a step as a fraction of the peak: warm-up × schedule, so the two may overlap."""
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    shape = {"constant-cosine": constant_cosine, "multi-step": multi_step}[schedule.kind]
    return warmup * shape(schedule, step / total)


def constant_cosine(schedule: ScheduleConfig, place: float) -> float:
    """V3: 1, then a cosine down to `floor`, then `floor`, then `final`. `place` is the fraction of the run done."""
    if place < schedule.constant_until:
        return 1.0
    if place < schedule.cosine_until:
        through = (place - schedule.constant_until) / (schedule.cosine_until - schedule.constant_until)
        return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * through)) / 2
    return schedule.floor if place < schedule.floor_until else schedule.final


def multi_step(schedule: ScheduleConfig, place: float) -> float:
    """DeepSeekMoE and V2: `decay_factor` to the number of `decay_at` places passed."""
    return schedule.decay_factor ** sum(place >= at for at in schedule.decay_at)


def mtp_weight(mtp: MtpConfig, place: float) -> float:
    """λ of V3 eq. 25."""
    return mtp.weight if place < mtp.switch_at else mtp.final_weight


def index_stage(indexer: IndexerConfig, place: float) -> IndexStage:
    """V3.2-Exp §2.1.1: what came before, then the dense warm-up of the indexers alone, then sparse training."""
    if place < indexer.dense_until:
        return "dense"
    return "warmup" if place < indexer.warmup_until else "sparse"


def bias_speed(balance: BalanceConfig, place: float) -> float:
    """γ of V3 §2.1.2."""
    return balance.bias_speed if place < balance.bias_until else 0.0
