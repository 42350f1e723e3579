"""How far a kernel may be from its specification: the bars of DeepGEMM's and FlashMLA's own tests, under names."""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8_DIFF = 1e-3
"""`calc_diff` of an FP8 product to the product of the unquantised factors."""
BF16_DIFF = 1e-5
"""`calc_diff` of a bfloat16 product to the one in float32."""
SAME_FP8_DIFF = 1e-6
"""`calc_diff` of two float32-accumulated products of the same FP8 numbers, one of them possibly rounded to bfloat16."""
MQA_DIFF = 5e-6
"""`calc_diff` of indexer logits to the same formula on the same quantised numbers, in float32."""
MQA_BF16_DIFF = 3e-5
"""The same for logits returned in bfloat16."""


@dataclass(frozen=True)
class Bar:
    """An element passes if it is within `absolute` or within `relative`; all together, if their direction agrees."""

    absolute: float
    relative: float
    cosine: float
    """Largest 1 − 2Σxy / Σ(x² + y²)."""


MLA_DENSE_OUT = Bar(8e-4, 2.01 / 128, 5e-6)
MLA_LSE = Bar(1e-6, 8.01 / 65536, 1e-6)
MLA_SPARSE_DECODE_OUT = Bar(1e-3, 2.01 / 128, 5e-6)
MLA_PREFILL_OUT = Bar(8e-4, 3.01 / 128, 7e-6)
MLA_PREFILL_LSE = Bar(1e-6, 2.01 / 65536, 1e-6)
"""FlashMLA's bars for bfloat16 inputs against a float32 computation."""


def calc_diff(x: Tensor, y: Tensor) -> float:
    """``1 − 2Σxy / Σ(x² + y²)`` in float64: 0 for equal tensors, and for two that are zero throughout."""
    x, y = x.double(), y.double()
    denominator = (x * x + y * y).sum().item()
    return 1.0 - 2.0 * (x * y).sum().item() / denominator if denominator else 0.0


def within(got: Tensor, want: Tensor, bar: Bar) -> str | None:
    """Why `got` misses `bar`; None if it does not. Infinities and NaN must stand in the same places."""
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, expected {list(want.shape)}"
    got, want = got.double(), want.double()
    for name, is_such in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = int((is_such(got) != is_such(want)).sum())
        if differ:
            return f"{differ} of {got.numel()} places differ in being {name}"
    finite = torch.isfinite(want)
    got, want = got[finite], want[finite]
    error = (got - want).abs()
    failed = (error > bar.absolute) & (error > bar.relative * want.abs())
    if failed.any():
        worst = int(error.where(failed, 0.0).argmax())
        return (
            f"{int(failed.sum())} of {failed.numel()} elements miss {bar.absolute:g} absolute and {bar.relative:g} "
            f"relative, the worst {got[worst].item():g} for {want[worst].item():g}"
        )
    difference = calc_diff(got, want)
    return f"direction differs by {difference:g}, more than {bar.cosine:g}" if difference > bar.cosine else None
