"""Layers whose weights multiply in FP8 while they train, and which of a block's layers those are (V3 §3.3).

Projections of attention and feed-forward, and the experts. Norms, gates, the attention itself and whatever stands
outside of the blocks, embedding and output head among it, stay as they are. The weights, their names and their
gradients stay float32, too: a checkpoint of such a model is one of the plain model.

T tokens, R rows in groups, D model, F feed-forward, E experts, K experts per token.
"""

from typing import Self

import torch
from torch import Tensor, nn

from nautile.layers.ffn import SwiGLU
from nautile.layers.linear import Linear
from nautile.layers.moe.experts import Experts
from nautile.ops.fp8_linear import fp8_grouped_linear, fp8_linear, fp8_linears
from nautile.ops.fp8_swiglu import fp8_swiglu
from nautile.ops.group_layout import ALIGNMENT
from nautile.ops.precision import compute_dtype
from nautile.ops.routing import combine_tokens, permute_tokens, row_map


class Fp8Linear(Linear):
    """`Linear` in FP8."""

    @classmethod
    def of(cls, linear: Linear) -> Self:
        """One with the very parameters of `linear`."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        return new

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] → [..., O]."""
        return fp8_linear(input, self.weight, self.bias)


class Fp8GroupedLinear(nn.Module):
    """A weight per group, [G, O, D], in FP8; rows lie in segments that begin at multiples of 128 (`group_layout`)."""

    def __init__(self, groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features))

    def forward(self, x_RD: Tensor, ends_G: Tensor) -> Tensor:
        """[R, D] → [R, O], 0 in padding rows."""
        return fp8_grouped_linear(x_RD, self.weight, ends_G)


class Fp8SwiGLU(SwiGLU):
    """`SwiGLU` in FP8: gate and up share one quantised input. Its `down_proj` is an `Fp8Linear`."""

    @classmethod
    def of(cls, ffn: SwiGLU) -> Self:
        """One with the very parameters of `ffn`."""
        with torch.device("meta"):
            new = cls(ffn.gate_proj.in_features, ffn.gate_proj.out_features)
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(new, name, Fp8Linear.of(getattr(ffn, name)))
        return new

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return self.down_proj(fp8_swiglu(*fp8_linears(x, self.gate_proj.weight, self.up_proj.weight)))


class Fp8Experts(Experts):
    """`Experts` in FP8, on rows grouped by expert."""

    @classmethod
    def of(cls, experts: Experts) -> Self:
        """One with the very parameters of `experts`."""
        E, D, F = experts.down_proj.shape
        with torch.device("meta"):
            new = cls(E, D, F)
        new.gate_up_proj, new.down_proj = experts.gate_up_proj, experts.down_proj
        return new

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D] → [T, D]."""
        rows = row_map(experts_TK, len(self.down_proj), ALIGNMENT)
        x_RD = permute_tokens(x_TD.to(compute_dtype(x_TD)), rows)
        gate_RF, up_RF = fp8_grouped_linear(x_RD, self.gate_up_proj, rows.ends_E).chunk(2, dim=-1)
        y_RD = fp8_grouped_linear(fp8_swiglu(gate_RF, up_RF), self.down_proj, rows.ends_E)
        return combine_tokens(y_RD, rows, weights_TK)


def in_fp8_(module: nn.Module) -> None:
    """Replace the projections, feed-forwards and experts inside `module` by those that multiply in FP8.

    Parameters stay the same objects under the same names, so an optimiser or a checkpoint does not notice. Layers of
    other types, such as an indexer's, are left alone.
    """
    for name, child in module.named_children():
        if type(child) is Linear:
            setattr(module, name, Fp8Linear.of(child))
        elif type(child) is SwiGLU:
            setattr(module, name, Fp8SwiGLU.of(child))
        elif type(child) is Experts:
            setattr(module, name, Fp8Experts.of(child))
        else:
            in_fp8_(child)
