"""Rotary position embedding on interleaved pairs."""

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
    B, S, _, R = x_BSHR.shape if x_BSHR.dim() == 4 else (0, 0, 0, 1)
    if R % 2 or cos_BSP.shape != (B, S, R // 2) or sin_BSP.shape != cos_BSP.shape:
        raise ValueError(
            "rotate_interleaved: want x [B, S, H, R] and cos, sin [B, S, R/2], got "
            f"{list(x_BSHR.shape)}, {list(cos_BSP.shape)}, {list(sin_BSP.shape)}"
        )
    return implementation("rotate_interleaved", x_BSHR)(x_BSHR, cos_BSP, sin_BSP)
