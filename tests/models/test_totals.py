"""The published sizes, counted twice: tensor by tensor in the model itself, built on the meta device, and by formula.

The numbers are those that model cards' safetensors metadata and dumps of the published files give. A model whose
shape is off by one anywhere, a tensor that the layout forgets, or a scale grid cut wrong moves them.
"""

import math
import time
from functools import cache

import pytest
import torch

from nautile.checkpoint.compare import named_tensors, targets
from nautile.checkpoint.fp8 import is_quantized, scale_shape
from nautile.models.accounting.parameters import fp8_scales, mtp_parameters, parameters, published_fp8_numbers, total
from nautile.models.accounting.shape import Shape, shape_from_config
from nautile.models.family import build_model, layout_of
from nautile.models.presets import PRESETS

EXACT = {
    "moe-16b": (16_375_728_128, 5_466),
    "v2-lite": (15_706_484_224, 5_291),
    "v2-236b": (235_741_434_880, 29_102),
    "coder-1.3b": (1_346_471_936, 219),
    "coder-6.7b": (6_740_512_768, 291),
    "coder-33b": (33_342_991_360, 561),
    "deepseek-llm-7b": (6_910_365_696, 273),
    "r1-distill-qwen-1.5b": (1_777_088_000, 339),
    "r1-distill-qwen-7b": (7_615_616_512, 339),
    "r1-distill-qwen-14b": (14_770_033_664, 579),
    "r1-distill-qwen-32b": (32_763_876_352, 771),
    "r1-distill-llama-8b": (8_030_261_248, 291),
    "r1-distill-llama-70b": (70_553_706_496, 723),
}
"""Preset → numbers and tensors of its published checkpoint, all of them bfloat16 or float32."""

FP8 = {
    "v3-671b": (671_026_419_200, 684_489_845_504, 684_531_386_000, 91_991),
    "v32-685b": (671_877_944_064, 685_355_329_792, 685_396_921_376, 92_425),
}
"""Preset → numbers of the main model, in all weights, in the file with its scales, and tensors in the file."""


@cache
def stored(name: str) -> dict[str, tuple[int, ...]]:
    """Published name → shape of every tensor of the preset's checkpoint, block scales aside."""
    config = PRESETS[name]
    with torch.device("meta"):
        model = build_model(config)
    layout = layout_of(config)
    shapes = {published: tuple(view.shape) for published, view in targets(model, layout).items()}
    ours = dict(named_tensors(model))
    return shapes | {published: tuple(ours[original].shape) for published, original in layout.copies.items()}


def numbers(name: str) -> int:
    return sum(map(math.prod, stored(name).values()))


def shape(name: str) -> Shape:
    return shape_from_config(PRESETS[name].to_hf(), name)


@pytest.mark.parametrize("name", EXACT)
def test_checkpoints_as_published(name):
    assert (numbers(name), len(stored(name))) == EXACT[name]
    assert total(parameters(shape(name))).total == numbers(name)


@pytest.mark.parametrize("name", FP8)
def test_fp8_checkpoints_as_published(name):
    main, weights, file, tensors = FP8[name]
    scales = [scale_shape(shape) for published, shape in stored(name).items() if is_quantized(published, shape)]
    assert numbers(name) == weights
    assert numbers(name) + sum(map(math.prod, scales)) == file == published_fp8_numbers(shape(name))
    assert len(stored(name)) + len(scales) == tensors
    assert total(parameters(shape(name))).total == main
    assert fp8_scales(shape(name)) == file - weights
    copies = 2 * PRESETS[name].vocab_size * PRESETS[name].hidden_size
    assert main + mtp_parameters(shape(name)).total + copies == weights


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_size_that_plan_says(name):
    """Also those without an exact published number: DeepSeek LLM 67B and the small ones."""
    copied = sum(math.prod(stored(name)[published]) for published in layout_of(PRESETS[name]).copies)
    assert total(parameters(shape(name))).total + mtp_parameters(shape(name)).total == numbers(name) - copied


def test_the_largest_model_is_built_in_seconds():
    """About one on an idle machine; minutes if its weights were initialised, or its 45k expert matrices modules."""
    started = time.monotonic()
    with torch.device("meta"):
        build_model(PRESETS["v3-671b"])
    assert time.monotonic() - started < 10


def test_one_expert_more_would_be_noticed():
    """Negative control of the counts above."""
    from dataclasses import replace

    config = replace(PRESETS["v2-lite"], n_routed_experts=65)
    assert total(parameters(shape_from_config(config.to_hf()))).total != EXACT["v2-lite"][0]
