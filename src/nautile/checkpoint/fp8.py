"""Block-quantised FP8 weights, as DeepSeek-V3, R1, V3.1 and V3.2 are published.

A quantised ``X.weight`` [R, C] is float8_e4m3fn; its sibling ``X.weight_scale_inv`` [⌈R/128⌉, ⌈C/128⌉] holds one factor
per block of 128 × 128. Blocks at the edges are cut: 576 rows make 5 block rows of 128, 128, 128, 128 and 64. The size
of a block comes from config.json alone; the grid of factors does not tell it (576 / 5 is no block).

    weight = float32(e4m3) · scale_inv, rounded once to the wanted dtype
    scale_inv = amax(|block|) / 448; for ``ue8m0``: 2^⌈log2(amax / 448)⌉

Source: DeepSeek-V3 ``inference/kernel.py`` and ``fp8_cast_bf16.py``, V3.2-Exp ``inference/kernel.py``.
Dims: R rows, C columns, r and c the blocks along them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nautile.core.errors import UserError

SCALE = "_scale_inv"
"""What follows a quantised weight's name in its scales' name."""
LARGEST = 448.0
"""Largest finite float8_e4m3fn."""
Block = tuple[int, int]

_QUANTIZED = re.compile(r"(model\.)?layers\.\d+\..*(_proj|\.kv_a_proj_with_mqa|\.indexer\.wq_b|\.indexer\.wk)\.weight")
_NEVER = re.compile(r".*\.(eh_proj|weights_proj)\.weight")


@dataclass(frozen=True)
class Fp8Format:
    """How a checkpoint's FP8 weights are quantised: ``quantization_config`` of its config.json."""

    block: Block = (128, 128)
    scale_fmt: Literal["ue8m0"] | None = None
    """``ue8m0``: scales are powers of two."""

    def to_hf(self) -> dict[str, Any]:
        """``quantization_config`` in DeepSeek's spelling."""
        published: dict[str, Any] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(self.block),
        }
        return published | ({"scale_fmt": self.scale_fmt} if self.scale_fmt else {})


def read_quantization(published: Mapping[str, Any], where: str) -> Fp8Format | None:
    """Format of a config.json's weights; None when they are not quantised.

    Args:
        published: The parsed config.json.
        where: Its path, for errors.

    Raises:
        UserError: They are quantised in a way that cannot be read.
    """
    entry = published.get("quantization_config")
    if not entry:
        return None
    if not isinstance(entry, Mapping):
        raise _refusal(where, f"quantization_config is {entry!r:.80}")
    method = entry.get("quant_method")
    if method != "fp8":
        raise _refusal(where, f"the weights are quantised with {method or 'an unnamed method'}")
    if entry.get("fmt", "e4m3") != "e4m3":
        raise _refusal(where, f"the weights are FP8 of format {entry['fmt']}")
    block = entry.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise _refusal(where, f"the weights are FP8 with weight_block_size {block}, not with a scale per block")
    scale_fmt = entry.get("scale_fmt")
    if scale_fmt not in (None, "ue8m0"):
        raise _refusal(where, f"the weights are FP8 with scales of format {scale_fmt}")
    return Fp8Format((block[0], block[1]), scale_fmt)


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the published weight `name` is FP8 in DeepSeek's FP8 checkpoints: the linear projections of all layers.

    Not so: embeddings, heads, norms, routers (``mlp.gate``), MTP's ``eh_proj``, the indexer's ``weights_proj``.
    """
    return len(shape) == 2 and bool(_QUANTIZED.fullmatch(name)) and not _NEVER.fullmatch(name)


def scale_shape(shape: tuple[int, ...], block: Block = (128, 128)) -> tuple[int, int]:
    """Shape [r, c] of the scales of a weight [R, C]."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize(weight_RC: Tensor, scale_inv_rc: Tensor, block: Block = (128, 128), start: int = 0) -> Tensor:
    """float32 [R, C]: every element times its block's scale.

    Args:
        weight_RC: float8_e4m3fn; all rows of a weight, or those from row `start` on.
        scale_inv_rc: Scales of the whole weight, in any floating dtype.
        block: Rows and columns that share a scale.
        start: Row of the whole weight that `weight_RC` begins with.
    """
    scale_Rc = scale_inv_rc.float()[torch.arange(start, start + len(weight_RC)) // block[0]]
    out_RC = _divided_by_256(weight_RC)
    if out_RC is None or not (scale_Rc * 256).isfinite().all():
        out_RC = weight_RC.float()
    else:
        scale_Rc = scale_Rc * 256
    for part, at in _block_columns(out_RC, block[1]):
        part.mul_(scale_Rc[:, at, None])
    return out_RC


def _divided_by_256(x: Tensor) -> Tensor | None:
    """float8_e4m3fn → float32 of x / 2⁸, exactly; about fifteen times as fast as torch's conversion on a CPU.

    Moved up by 7 bits, exponent and mantissa of x are those of a float16 that is 2⁸ times smaller, since the exponents'
    biases are 7 and 15; subnormal numbers follow the same rule. NaN does not: None if there is one.
    """
    bits = x.view(torch.int8)
    if x.device.type != "cpu" or not x.numel() or (bits & 0x7F).amax() == 0x7F:
        return None
    without_copied_sign = ~(1 << 14)  # widening repeats the sign in the bits above
    return ((bits.to(torch.int16) << 7) & without_copied_sign).view(torch.float16).float()


def quantize(
    weight_RC: Tensor, block: Block = (128, 128), scale_fmt: Literal["ue8m0"] | None = None, name: str = "the weight"
) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [R, C] and float32 scales [r, c] of a weight; a block of zeros has scale 1.

    Raises:
        UserError: `name` holds NaN or infinity, which no scale can represent.
    """
    out_RC = torch.empty(weight_RC.shape, dtype=torch.float8_e4m3fn)
    scale_rc = torch.empty(scale_shape(tuple(weight_RC.shape), block))
    for i in range(len(scale_rc)):
        rows_RC = weight_RC[i * block[0] : (i + 1) * block[0]]
        scaled_RC = rows_RC.to("cpu", torch.float32, copy=True)
        for part, at in _block_columns(scaled_RC, block[1]):
            amax_c = part.abs().amax(dim=(0, 2))
            if not amax_c.isfinite().all():
                raise UserError(
                    f"{name} holds NaN or infinity, in rows {i * block[0]} to {i * block[0] + len(rows_RC) - 1}",
                    "each FP8 block is scaled by its largest value",
                    "check the training run or the download that the weights come from",
                )
            scale_rc[i, at] = _scale(amax_c, scale_fmt)
            part.div_(scale_rc[i, at, None])
        out_RC[i * block[0] :][: len(rows_RC)] = scaled_RC.to(torch.float8_e4m3fn)
    return out_RC, scale_rc


def _scale(amax_c: Tensor, scale_fmt: str | None) -> Tensor:
    # No smaller than the smallest normal float32, which ue8m0 ends at, too.
    scale_c = torch.where(amax_c > 0, (amax_c / LARGEST).clamp(min=2.0**-126), 1.0)
    if scale_fmt != "ue8m0":
        return scale_c
    mantissa, exponent = torch.frexp(scale_c)  # scale = mantissa · 2^exponent with mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(scale_c), torch.where(mantissa == 0.5, exponent - 1, exponent))


def _block_columns(x_RC: Tensor, width: int) -> Iterator[tuple[Tensor, slice]]:
    """Views [R, c, width] of x and the block columns they are: the whole ones together, then a partial one."""
    whole = x_RC.shape[1] // width
    if whole:
        yield x_RC[:, : whole * width].unflatten(1, (whole, width)), slice(0, whole)
    if whole * width < x_RC.shape[1]:
        yield x_RC[:, None, whole * width :], slice(whole, whole + 1)


def _refusal(where: str, what: str) -> UserError:
    return UserError(
        f"{where}: {what}",
        "nautile reads float32, float16 and bfloat16 weights, and FP8 (e4m3) with a scale per block, "
        'as {"quant_method": "fp8", "weight_block_size": [128, 128]} says',
        "name a checkpoint in one of these, such as the original one that this one was quantised from",
    )
