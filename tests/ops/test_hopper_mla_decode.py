"""mla_decode.cu itself, executed on a CPU by the emulator, against the specification."""

import pytest
import torch
from hopper_emulation import run_mla_decode

from nautile.core.jit import why_no_cxx
from nautile.ops.hopper.mla_plan import LATENT, VALUE, plan, why_unfit
from nautile.ops.numerics import MLA_DENSE_OUT, MLA_LSE, within
from nautile.ops.reference import paged_latents as reference
from nautile.ops.split_kv import Splits, list_splits

pytestmark = pytest.mark.skipif(why_no_cxx() is not None, reason=str(why_no_cxx()))
NAN = float("nan")


def split(lengths: list[int], parts: int) -> Splits:
    table, ends = list_splits(lengths, parts)
    table += [(-1, 0, 0)] * (len(lengths) + parts - len(table))
    return Splits(torch.tensor(table, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32))


CASES = [
    # lengths, S, H, P, workers, causal
    pytest.param([1, 64, 0, 100], 1, 3, 64, 1, False, id="one-split-each"),
    pytest.param([300, 5], 2, 35, 128, 3, True, id="causal-two-tiles-of-rows-split"),
    pytest.param([2], 4, 16, 64, 1, True, id="rows-that-see-nothing"),
]


@pytest.mark.parametrize("lengths, S, H, P, parts, causal", CASES)
def test_decode(lengths: list[int], S: int, H: int, P: int, parts: int, causal: bool) -> None:
    B, W = len(lengths), max(-(-length // P) for length in lengths)
    N = B * W + 2
    q = torch.randn(B, S, H, LATENT).mul(16).bfloat16()  # scores of deviation 1.6
    cache = torch.full((N, P, 1, LATENT), NAN).bfloat16()
    table = torch.full((B, W), 2_147_480_000, dtype=torch.int32)
    free = torch.randperm(N).tolist()
    for b, length in enumerate(lengths):
        for w in range(-(-length // P)):
            table[b, w] = page = free.pop()
            rows = min(P, length - w * P)
            cache[page, :rows] = (torch.randn(rows, 1, LATENT) / 10).bfloat16()
    splits = split(lengths, parts)
    R = splits.table_R3.shape[0]
    o, lse = torch.full((B, S, H, VALUE), NAN).bfloat16(), torch.full((B, H, S), NAN)
    part_o, part_lse = torch.full((R, S, H, VALUE), NAN), torch.full((R, S, H), NAN)
    assert why_unfit(q, cache, VALUE) is None
    lengths_B = torch.tensor(lengths, dtype=torch.int32)
    scale = LATENT**-0.5
    run_mla_decode(plan(q, cache, table, lengths_B, splits, scale, causal, o, lse, part_o, part_lse), seed=S)
    want, want_lse = reference.paged_mla_decode(q, cache, table, lengths_B, VALUE, scale, causal, None)
    assert within(o, want, MLA_DENSE_OUT) is None
    assert within(lse, want_lse, MLA_LSE) is None


def test_sizes_that_are_not_deepseeks_are_named() -> None:
    q, cache = torch.zeros(1, 1, 4, LATENT).bfloat16(), torch.zeros(2, 64, 1, LATENT).bfloat16()
    assert "one latent head" in str(why_unfit(q, cache.expand(2, 64, 2, LATENT), VALUE))
    assert "values of 512" in str(why_unfit(q, cache, 256))
    assert "bfloat16" in str(why_unfit(q.half(), cache.half(), VALUE))
    assert "multiple of 64" in str(why_unfit(q, cache[:, :48], VALUE))
