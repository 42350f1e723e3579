"""The arithmetic of a projection in FP8: what is quantised how, and the products of the backward pass.

See `nautile.ops.fp8_linear`. R rows, D inputs, O outputs, G groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nautile.ops.dispatch import implementation
from nautile.ops.fp8_products import BLOCK_K, ROWS, SQUARES
from nautile.ops.fp8_tensor import Block, Fp8Tensor
from nautile.ops.group_layout import aligned


def gradients(
    grads_RO: Sequence[Tensor],
    x: Fp8Tensor,
    weights: Sequence[Fp8Tensor],
    D: int,
    needs_x: bool,
    needs_weight: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, in the dtype of the gradients, and a float32 dW for each weight; None where none is needed."""
    grad_x: Tensor | None = None
    grad_weights: list[Tensor | None] = [None] * len(weights)
    turned = turned_activation(x, D) if any(needs_weight) else None
    for i, (grad_RO, w) in enumerate(zip(grads_RO, weights, strict=True)):
        small_RO, unit = lifted(grad_RO)
        if needs_x:
            grad_x = product(gradient(small_RO, unit), turned_weight(w, D), grad_RO.dtype, grad_x)
        if needs_weight[i] and turned is not None:
            grad_weights[i] = product(turned_gradient(small_RO, unit), turned, torch.float32)
    return grad_x, grad_weights


def grouped_gradients(
    grad_RO: Tensor,
    x: Fp8Tensor,
    w: Fp8Tensor,
    D: int,
    ends_G: Tensor,
    groups_R: Tensor,
    alignment: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx, in the dtype of the gradient, and the float32 dW [G, O, D]; None where none is needed."""
    grad_x = grad_w = None
    small_RO, unit = lifted(cleared(grad_RO, groups_R))
    if needs_x:
        grad_x = grouped_product(gradient(small_RO, unit), turned_weight(w, D), groups_R, grad_RO.dtype, alignment)
    if needs_weight:
        a, b = turned_gradient(small_RO, unit), turned_activation(x, D)
        grad_w = torch.empty((len(ends_G), a.shape[0], D), dtype=torch.float32, device=a.device)
        implementation("k_grouped_fp8_gemm", a.data)(a, b, ends_G, None, grad_w, alignment)
    return grad_x, grad_w


def activation(x_RD: Tensor) -> Fp8Tensor:
    """x̂, in whole blocks."""
    return _quantized(x_RD, ROWS, ue8m0=True)


def weight(weight_OD: Tensor) -> Fp8Tensor:
    """Ŵ, in whole blocks."""
    return _quantized(weight_OD, SQUARES)


def turned_weight(w: Fp8Tensor, D: int) -> Fp8Tensor:
    """Ŵᵀ [D, O], in whole blocks."""
    return _first_rows(_whole(w.t()), D)


def turned_activation(x: Fp8Tensor, D: int) -> Fp8Tensor:
    """x̃ᵀ [D, R], in whole blocks."""
    data, scale = implementation("requantize_transposed", x.data)(x, ROWS, True)
    return _first_rows(_whole(Fp8Tensor(data, scale, ROWS)), D)


def lifted(grad_RO: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient with its largest number brought near 1, and the power of two that undoes it.

    Quantisers do not tell numbers below 10⁻⁴ from zeros: an activation is none, all of a gradient may be, since it is
    divided by the number of tokens in the batch.
    """
    largest = grad_RO.abs().amax() if grad_RO.numel() else grad_RO.new_zeros(())
    _, exponent = torch.frexp(largest.float())
    unit = torch.exp2(exponent.clamp(-100, 100).float())
    return grad_RO * (1 / unit).to(grad_RO.dtype), unit


def gradient(grad_RO: Tensor, unit: Tensor) -> Fp8Tensor:
    """dŷ, in whole blocks, from what `lifted` gives."""
    x = _quantized(grad_RO, ROWS)
    return Fp8Tensor(x.data, x.scale * unit, x.block)


def turned_gradient(grad_RO: Tensor, unit: Tensor) -> Fp8Tensor:
    """dỹᵀ [O, R], in whole blocks; from the gradient itself, which need not be kept, so it is rounded once."""
    return gradient(grad_RO.mT, unit)


def _quantized(x: Tensor, block: Block, ue8m0: bool = False) -> Fp8Tensor:
    data, scale = implementation("quantize_fp8", x)(x.detach(), block, ue8m0)
    return _whole(Fp8Tensor(data, scale, block))


def _whole(x: Fp8Tensor) -> Fp8Tensor:
    """`x` with zeros in the columns that its last block lacks."""
    missing = aligned(x.shape[-1], BLOCK_K) - x.shape[-1]
    if not missing:
        return x
    data = F.pad(x.data.view(torch.uint8), (0, missing)).view(torch.float8_e4m3fn)
    return Fp8Tensor(data, x.scale, x.block)


def _first_rows(x: Fp8Tensor, count: int) -> Fp8Tensor:
    """The first rows: without those that only fill a block."""
    return Fp8Tensor(x.data[..., :count, :], x.scale[..., : -(-count // x.block[0]), :], x.block)


def cleared(x_RD: Tensor, groups_R: Tensor) -> Tensor:
    """`x_RD` with zeros in padding rows, whose numbers would otherwise share scales with real ones."""
    return torch.where(groups_R[:, None] >= 0, x_RD, 0)


def product(a: Fp8Tensor, b: Fp8Tensor, dtype: torch.dtype, c_MN: Tensor | None = None) -> Tensor:
    """``C + A·Bᵀ`` of operands that fit: the checks of `fp8_gemm` would read all scales once more."""
    out = torch.empty((a.shape[0], b.shape[0]), dtype=dtype, device=a.device)
    return implementation("fp8_gemm", a.data)(a, b, c_MN, out)


def grouped_product(a: Fp8Tensor, b: Fp8Tensor, groups_R: Tensor, dtype: torch.dtype, alignment: int) -> Tensor:
    """The same of rows in groups, 0 in padding rows."""
    out = torch.empty((a.shape[0], b.shape[1]), dtype=dtype, device=a.device)
    return implementation("grouped_fp8_gemm", a.data)(a, b, groups_R, out, alignment)
