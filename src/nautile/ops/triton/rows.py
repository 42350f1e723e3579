"""Attention to chosen rows with the kernels of `rows_forward` and `rows_backward`: shapes, tiles, launches.

B sequences, S queries, H heads, C latent, R rope, T rows, K places.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nautile.ops.triton.flash import row_dots, rows_of
from nautile.ops.triton.rows_backward import gradients_of_row_queries, gradients_of_rows
from nautile.ops.triton.rows_forward import attend_rows
from nautile.ops.triton.support import next_power_of_two

APART_NUMBERS = 1 << 26
"""Float32 numbers that places write apart at once, when their sum must keep its order: 256 MiB."""


class Operands(NamedTuple):
    """What a query meets: latents are key and value, rotated keys are key only. R may be 0."""

    q_BSHC: Tensor
    q_rope_BSHR: Tensor
    c_BTC: Tensor
    k_rope_BTR: Tensor
    rows_BSK: Tensor
    """int32 or int64; what is no row number below T marks an unused place."""
    length_BS: Tensor | None
    """Places that count, from the left; None: all of them."""

    @classmethod
    def of(
        cls, tensors: tuple[Tensor, Tensor, Tensor, Tensor], rows: Tensor, length: Tensor | None, dtype: torch.dtype
    ) -> "Operands":
        """Tensors in the compute dtype, as the kernels want them; copied only where they must be."""
        q, q_rope, c, k_rope = (rows_of(x, dtype) for x in tensors)
        return cls(q, q_rope, c, k_rope, rows.contiguous(), None if length is None else length.contiguous())

    @property
    def strides(self) -> tuple[int, ...]:
        """As the kernels take them, from the queries' to the rotated keys'."""
        return (
            *self.q_BSHC.stride()[:3], *self.q_rope_BSHR.stride()[:3],
            *self.c_BTC.stride()[:2], *self.k_rope_BTR.stride()[:2],
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """S, H, T, K."""
        _, S, H, _ = self.q_BSHC.shape
        return S, H, self.c_BTC.shape[1], self.rows_BSK.shape[2]

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """C, R, and their tiles."""
        C, R = self.c_BTC.shape[2], self.k_rope_BTR.shape[2]
        return C, R, max(16, next_power_of_two(C)), max(16, next_power_of_two(R)) if R else 0


class Tile(NamedTuple):
    heads: int
    places: int
    num_warps: int
    num_stages: int


def tile_for(heads: int, c_tile: int, element_size: int, backward: bool) -> Tile:
    """Blocks of heads and places. A sum as wide as a latent fills the registers: 64 heads of it forward, and 32
    backward, where two factors of its size stay in shared memory beside the gathered rows. Of latents wider than 512
    numbers neither has room for more than 16. Few numbers per thread do better with fewer threads or fewer places.
    """
    if element_size > 2:
        return Tile(16, 16, 8, 1 if backward else 2)
    heads = max(16, next_power_of_two(heads))
    if c_tile > 512:
        return Tile(16, 32, 8, 2)
    if backward:
        return Tile(min(heads, 32), 64 if c_tile > 128 else 32, 8, 2)
    return Tile(min(heads, 64), 64, 4 if heads == 16 else 8, 2)


class Parts(NamedTuple):
    columns: int
    heads: int
    places: int


def parts_for(heads: int, c_tile: int, element_size: int) -> Parts:
    """Blocks of the gradient of rows: columns of a latent at a time, heads, and places."""
    if element_size > 2:
        return Parts(min(32, c_tile), 32, 32)
    return Parts(min(64, c_tile), min(128, max(16, next_power_of_two(heads))), 64)


def forward(operands: Operands, sink_H: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """o_BSHC in the operands' dtype, then largest score and natural lse [B, S, H] in float32."""
    q = operands.q_BSHC
    out = q.new_empty(q.shape)
    largest, lse = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    tile = _tile(operands, backward=False)
    B, (S, H, _, _) = q.shape[0], operands.sizes
    if out.numel():
        attend_rows[(B * S * triton.cdiv(H, tile.heads),)](
            *operands, sink_H, out, largest, lse, *operands.strides, *operands.sizes, scale,
            *operands.widths, tile.heads, tile.places, operands.length_BS is not None, sink_H is not None,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, largest, lse


def backward_queries(
    operands: Operands, grad: Tensor, lse_BSH: Tensor, delta_BSH: Tensor, dq_BSHC: Tensor, dq_rope_BSHR: Tensor,
    scale: float,
) -> None:  # fmt: skip
    """Writes the gradients of the queries. `lse` holds the sink; outputs are views of which [B, S] is one dimension."""
    tile = _tile(operands, backward=True)
    B, (S, H, _, _) = grad.shape[0], operands.sizes
    if not dq_BSHC.numel():
        return
    gradients_of_row_queries[(B * S * triton.cdiv(H, tile.heads),)](
        *operands, grad, lse_BSH, delta_BSH, dq_BSHC, dq_rope_BSHR, *operands.strides,
        *dq_BSHC.stride()[1:3], *dq_rope_BSHR.stride()[1:3], *operands.sizes, scale,
        *operands.widths, tile.heads, tile.places, operands.length_BS is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def backward_rows(operands: Operands, grad: Tensor, lse_BSH: Tensor, delta_BSH: Tensor, scale: float) -> Tensor:
    """Gradient of [c, k_rope], [B, T, C + R] in float32; its sums keep their order if torch is told to."""
    B, (S, H, T, K) = grad.shape[0], operands.sizes
    C, R, c_tile, r_tile = operands.widths
    # What unused places write apart ends in a row behind the last.
    total = torch.zeros(B, T + 1, C + R, dtype=torch.float32, device=grad.device)
    parts = parts_for(H, c_tile, operands.q_BSHC.element_size())

    def launch(into: Tensor, first: int, count: int, atomic: bool) -> None:
        dc, dk_rope = into[..., :C], into[..., C:]
        gradients_of_rows[(count * triton.cdiv(K, parts.places),)](
            *operands, grad, lse_BSH, delta_BSH, dc, dk_rope if R else dc, *operands.strides,
            *dc.stride()[:2], *dk_rope.stride()[:2], *operands.sizes, first, scale,
            C, R, parts.columns, r_tile, parts.heads, parts.places, operands.length_BS is not None, atomic,
            num_warps=8, num_stages=2,
        )  # fmt: skip

    if not grad.numel() or not K:
        return total[:, :T]
    if not torch.are_deterministic_algorithms_enabled():
        launch(total, 0, B * S, atomic=True)
        return total[:, :T]
    rows = operands.rows_BSK.long()
    sequence = torch.arange(B, device=rows.device)[:, None, None] * (T + 1)
    rows_NK = (rows.where((rows >= 0) & (rows < T), T) + sequence).flatten(0, 1)
    some = max(1, APART_NUMBERS // (K * (C + R)))
    for first in range(0, B * S, some):
        count = min(some, B * S - first)
        apart = grad.new_empty(count, K, C + R, dtype=torch.float32)
        launch(apart, first, count, atomic=False)
        total.flatten(0, 1).index_add_(0, rows_NK[first : first + count].flatten(), apart.flatten(0, 1))
    return total[:, :T]


def _tile(operands: Operands, backward: bool) -> Tile:
    q = operands.q_BSHC
    return tile_for(q.shape[2], operands.widths[2], q.element_size(), backward)


def deltas(grad: Tensor, out: Tensor) -> Tensor:
    """Σ_c do o for each query and head, in float32."""
    return row_dots(grad, out) if out.numel() else out.new_zeros(out.shape[:-1], dtype=torch.float32)
