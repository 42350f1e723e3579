import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautile.train.recipe import BalanceConfig, MtpConfig, ScheduleConfig, load_recipe
from nautile.train.schedule import bias_speed, learning_rate_factor, mtp_weight, settings_at

V3 = ScheduleConfig(warmup_steps=0)
STEPS = 148_000  # one step is 100 million of V3's 14.8 trillion tokens


@pytest.mark.parametrize(
    ("tokens_in_trillions", "lr"),
    [(0, 2.2e-4), (9.9, 2.2e-4), (12.155, 1.21e-4), (14.3, 2.2e-5), (14.6, 2.2e-5), (14.7, 7.3e-6), (14.79, 7.3e-6)],
)
def test_constant_cosine_gives_the_published_learning_rates(tokens_in_trillions, lr):
    step = round(tokens_in_trillions * 10_000)
    assert 2.2e-4 * learning_rate_factor(V3, step, STEPS) == pytest.approx(lr, rel=5e-3)


@pytest.mark.parametrize(
    ("decay_at", "place", "factor"),
    [
        ((0.6, 0.9), 0.59, 1),
        ((0.6, 0.9), 0.6, 0.316),
        ((0.6, 0.9), 0.95, 0.316**2),
        ((0.8, 0.9), 0.85, 0.316),
        ((), 1, 1),
    ],
)
def test_multi_step_multiplies_at_each_place(decay_at, place, factor):
    schedule = ScheduleConfig(kind="multi-step", warmup_steps=0, decay_at=decay_at)
    assert learning_rate_factor(schedule, round(place * 1000), 1000) == pytest.approx(factor)


def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step():
    schedule = ScheduleConfig(warmup_steps=4)
    assert [learning_rate_factor(schedule, step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


@given(
    kind=st.sampled_from(["constant-cosine", "multi-step"]),
    total=st.integers(1, 5000),
    warmup=st.integers(0, 300),
    places=st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted),
)
def test_after_the_warm_up_the_rate_never_rises_and_stays_in_its_bounds(kind, total, warmup, places):
    constant_until, cosine_until, floor_until = places
    schedule = ScheduleConfig(
        kind=kind,
        warmup_steps=warmup,
        constant_until=constant_until,
        cosine_until=cosine_until,
        floor_until=floor_until,
        decay_at=tuple(places),
    )
    factors = [learning_rate_factor(schedule, step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    settled = factors[min(warmup, total) :]
    assert all(later <= earlier + 1e-12 for earlier, later in zip(settled, settled[1:], strict=False))


@given(steps=st.integers(20, 3000))
def test_the_cosine_has_no_jump_where_it_begins_or_ends(steps):
    schedule = replace(V3, floor_until=1.0)
    factors = [learning_rate_factor(schedule, step, steps) for step in range(steps)]
    steepest = math.pi / 2 * (1 - schedule.floor) / ((schedule.cosine_until - schedule.constant_until) * steps)
    assert max(a - b for a, b in zip(factors, factors[1:], strict=False)) <= steepest * 1.01


def test_weights_switch_where_v3_switched_them():
    assert [mtp_weight(MtpConfig(), place) for place in (0, 0.675, 0.676, 1)] == [0.3, 0.3, 0.1, 0.1]
    assert [bias_speed(BalanceConfig(), place) for place in (0, 0.965, 0.966, 1)] == [0.001, 0.001, 0, 0]


def test_stopping_early_leaves_the_schedule_alone():
    recipe = load_recipe("v3-nano")
    shorter = replace(recipe, train=replace(recipe.train, stop_after=3))
    assert [settings_at(recipe, s) for s in range(100)] == [settings_at(shorter, s) for s in range(100)]
