"""Which dtype each weight of a converted folder gets: the rules behind ``--dtype``.

    asked for    FP8 weights           other floating weights
    bf16, fp16   dequantised, rounded  rounded; float32 ones that the publisher kept wide stay
    fp32         dequantised           float32
    fp8          (refused)             DeepSeek's FP8 set is quantised, the rest as with bf16

A publisher "kept wide" what is float32 in a folder that is mostly of narrower numbers: the norms of V3.2, the routing
bias of V3. The job on FP8 folders is then that of DeepSeek-V3's ``fp8_cast_bf16.py``, which touches FP8 weights only.
Of a folder that is all float32, the rules of `WIDE` say what DeepSeek's files keep.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from nautile.checkpoint.convert.job import Cast, Job, Output, quantising
from nautile.checkpoint.convert.options import Options
from nautile.checkpoint.fp8 import SCALE, Fp8Format, is_quantized
from nautile.checkpoint.source import Checkpoint
from nautile.core.errors import UserError

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
"""``--dtype`` → dtype of what is not quantised."""
WIDE: tuple[tuple[str | None, re.Pattern[str]], ...] = (
    # Biases near 5 whose spacing in bfloat16, 0.03, would change the routing.
    (None, re.compile(r".*\.e_score_correction_bias")),
    ("deepseek_v32", re.compile(r".*norm\.(weight|bias)")),
)
"""Model type (None: any) → names that DeepSeek publishes in float32 whatever the folder's dtype."""


def jobs(checkpoint: Checkpoint, options: Options, config: Mapping[str, Any]) -> list[Job]:
    """One job per weight, in the folder's order, with names as published; without a dtype, one per stored tensor.

    Raises:
        UserError: A weight cannot be dequantised, or there is nothing to quantise.
    """
    fmt = fp8_format(options)
    quantised = _check_fp8(checkpoint, fmt)
    if options.dtype is None:
        return [_job(name, info.dtype, checkpoint) for name, info in checkpoint.infos.items()]
    rest = TORCH[options.dtype]
    keep_wide = rest != torch.float32 and _main_dtype(checkpoint) != torch.float32
    made = []
    for name in checkpoint.weight_names():
        info = checkpoint.infos[name]
        if name in quantised:
            assert fmt
            weight = Output(name, torch.float8_e4m3fn, info.shape)
            made.append(quantising(name, weight, name + SCALE, fmt))
        else:
            made.append(_job(name, _dtype(name, info.dtype, rest, keep_wide, config.get("model_type")), checkpoint))
    return made


def _job(name: str, dtype: torch.dtype, checkpoint: Checkpoint) -> Job:
    info = checkpoint.infos[name]
    return Job(name, Cast.KEEP if dtype == info.dtype else Cast.FLOAT, Output(name, dtype, info.shape))


def fp8_format(options: Options) -> Fp8Format | None:
    """How ``--dtype fp8`` quantises; None for the other dtypes."""
    if options.dtype != "fp8":
        return None
    return Fp8Format(scale_fmt="ue8m0" if options.scale_format == "ue8m0" else None)


def _check_fp8(checkpoint: Checkpoint, fmt: Fp8Format | None) -> set[str]:
    """Check that all FP8 weights can be read; the names of the weights that `fmt` quantises.

    Raises:
        UserError: An FP8 weight lacks its scales, or `fmt` is given for a folder with nothing left to quantise.
    """
    names = checkpoint.weight_names()
    for name in names:
        if checkpoint.quantization_problem(name):
            checkpoint.scales(name)  # raises, before it reads
    if fmt is None:
        return set()
    already = sum(checkpoint.infos[name].dtype.itemsize == 1 and name + SCALE in checkpoint.infos for name in names)
    if already:
        raise UserError(
            f"{checkpoint.folder}: {already} weights are FP8 already",
            "quantising them a second time would only lose accuracy",
            "copy the folder as it is, or convert it with --dtype bf16",
        )
    chosen = {name for name in names if is_quantized(name, checkpoint.infos[name].shape)}
    if not chosen:
        raise UserError(
            f"{checkpoint.folder}: no weight to quantise",
            "FP8 takes the linear projections of model.layers.N, as DeepSeek's published folders do",
            "--dtype bf16",
        )
    return chosen


def _dtype(name: str, stored: torch.dtype, wanted: torch.dtype, keep_wide: bool, model_type: object) -> torch.dtype:
    if not stored.is_floating_point:
        return stored
    if any(family in (None, model_type) and pattern.fullmatch(name) for family, pattern in WIDE):
        return torch.float32
    return stored if keep_wide and stored == torch.float32 else wanted


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """The floating dtype of most numbers."""
    count: Counter[torch.dtype] = Counter()
    for name in checkpoint.weight_names():
        info = checkpoint.infos[name]
        if info.dtype.is_floating_point:
            count[info.dtype] += math.prod(info.shape)
    return count.most_common(1)[0][0] if count else None
