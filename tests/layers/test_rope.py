"""Rotary frequencies against the published constants of DeepSeek's YaRN files."""

import math
from dataclasses import replace

import pytest
import torch

from nautile import ops
from nautile.layers.rope import Rope
from nautile.layers.rope_scaling import YarnScaling


def test_plain_frequencies_and_relative_positions() -> None:
    rope = Rope(8, 100.0)
    assert rope.frequencies.tolist() == pytest.approx([1, 100**-0.25, 0.1, 100**-0.75])
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).double()

    def score(at: int, back: int) -> float:
        rotated = [ops.rotate_interleaved(x, *rope.cos_sin(torch.tensor([[p]]))) for x, p in ((q, at), (k, at - back))]
        return float((rotated[0] * rotated[1]).sum())

    assert score(3, 2) == pytest.approx(score(90, 2), abs=1e-5)
    assert abs(score(3, 2) - score(3, 1)) > 1e-3


def test_interleaved_pairs_turn_as_complex_numbers() -> None:
    x = torch.randn(2, 5, 3, 6, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    rope = Rope(6, 10000.0)
    cos, sin = rope.cos_sin(positions)
    turn = torch.polar(torch.ones(2, 5, 3), positions[..., None] * rope.frequencies)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * turn[:, :, None]).flatten(-2)
    torch.testing.assert_close(ops.rotate_interleaved(x, cos, sin), expected)


def test_yarn_of_the_published_v3_file() -> None:
    """64 dimensions, base 10000, 4096 → 163840: pairs below 10 keep their frequency, above 23 are 40 times slower."""
    plain, yarn = Rope(64, 10000.0), Rope(64, 10000.0, YarnScaling())
    ratio = yarn.frequencies / plain.frequencies
    assert ratio[:11].tolist() == pytest.approx([1.0] * 11)
    assert ratio[23:].tolist() == pytest.approx([1 / 40] * 9)
    assert all(a > b for a, b in zip(ratio[10:23], ratio[11:24], strict=True))
    assert yarn.amplitude == 1.0
    assert yarn.softmax_factor == pytest.approx(1.8738, abs=1e-4)


def test_softmax_factor_of_the_other_published_files() -> None:
    v2 = YarnScaling(mscale=0.707, mscale_all_dim=0.707)
    assert Rope(64, 1e4, v2).softmax_factor == pytest.approx(1.5896, abs=1e-4)
    silent = replace(v2, mscale=1.0, mscale_all_dim=0.0)
    assert Rope(64, 1e4, silent).softmax_factor == 1.0
    assert Rope(64, 1e4, silent).amplitude == pytest.approx(0.1 * math.log(40) + 1)


def test_frequencies_are_copied_once_per_device() -> None:
    rope, meta = Rope(6, 100.0), torch.device("meta")
    assert rope.frequencies_on(meta) is rope.frequencies_on(meta)
    assert rope.cos_sin(torch.zeros(1, 2, dtype=torch.int64, device=meta))[0].device == meta
    assert rope.frequencies_on(torch.device("cpu")) is rope.frequencies
