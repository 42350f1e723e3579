"""Rotary position embedding, on neighbouring pairs (MLA) and on the two halves of a head (Llama, Qwen2, MoE-16B)."""

from torch import Tensor

from nautile.ops.dispatch import implementation


def rotate_interleaved(x_BSHR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor) -> Tensor:
    """Turn each pair of neighbouring dimensions by its position's angle (arXiv 2104.09864, eq. 34).

    ``(x_2i, x_2i+1) → (x_2i cos_i − x_2i+1 sin_i, x_2i sin_i + x_2i+1 cos_i)``, pairs staying where they are.
    Differentiable in x. The result has the dtype of x.

    Args:
        x_BSHR: R even.
        cos_BSP: Cosines of the P = R / 2 angles of each position, broadcast over heads.
        sin_BSP: Sines, of the same shape.

    Raises:
        ValueError: Shapes do not fit together.
    """
    _check("rotate_interleaved", x_BSHR, cos_BSP, sin_BSP)
    return implementation("rotate_interleaved", x_BSHR)(x_BSHR, cos_BSP, sin_BSP)


def rotate_half_split(x_BSHR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor) -> Tensor:
    """Turn each pair (i, i + P) of dimensions by its position's angle: the layout of Llama's published weights.

    ``(x_i, x_P+i) → (x_i cos_i − x_P+i sin_i, x_i sin_i + x_P+i cos_i)`` with P = R / 2. The same rotation as
    `rotate_interleaved` in another order of dimensions; weights made for one give other scores under the other.
    Differentiable in x. The result has the dtype of x.

    Args:
        x_BSHR: R even.
        cos_BSP: Cosines of the P angles of each position, broadcast over heads.
        sin_BSP: Sines, of the same shape.

    Raises:
        ValueError: Shapes do not fit together.
    """
    _check("rotate_half_split", x_BSHR, cos_BSP, sin_BSP)
    return implementation("rotate_half_split", x_BSHR)(x_BSHR, cos_BSP, sin_BSP)


def _check(op: str, x_BSHR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor) -> None:
    B, S, _, R = x_BSHR.shape if x_BSHR.dim() == 4 else (0, 0, 0, 1)
    if R % 2 or cos_BSP.shape != (B, S, R // 2) or sin_BSP.shape != cos_BSP.shape:
        raise ValueError(
            f"{op}: want x [B, S, H, R] and cos, sin [B, S, R/2], got "
            f"{list(x_BSHR.shape)}, {list(cos_BSP.shape)}, {list(sin_BSP.shape)}"
        )
