"""Attention to chosen rows, a block of queries at a time: what `gathered_attention` and `sparse_mla_prefill` share.

Gathered rows and scores of one block exist at once, and the backward gathers and multiplies again. S queries, T rows,
K places, H heads, C latent, R rope.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

GATHERED_NUMBERS = 1 << 22
"""Numbers of gathered latents and scores that exist at once: 16 MiB in float32."""


def blocks_of_queries(S: int, K: int, width: int) -> Iterator[slice]:
    """Queries of each block, for `width` numbers of each query and place."""
    size = max(1, GATHERED_NUMBERS // (K * width or 1))
    return (slice(s, min(s + size, S)) for s in range(0, S, size))


def with_a_row(x: Tensor) -> Tensor:
    """`x` [..., T, C], or a row of zeros if T is 0: unused places point to row 0, which must be there."""
    return x if x.shape[-2] else torch.nn.functional.pad(x, (0, 0, 0, 1))


class Block(NamedTuple):
    """Queries of one sequence and the rows they name, all in the dtype of the products."""

    q_SHC: Tensor
    q_rope_SHR: Tensor
    c_SKC: Tensor
    k_rope_SKR: Tensor
    rows_SK: Tensor
    """Row numbers; 0 in unused places."""
    unused_SK: Tensor | None
    """None: all places are used."""

    @classmethod
    def gathered(
        cls, q_SHC: Tensor, q_rope_SHR: Tensor, c_TC: Tensor, k_rope_TR: Tensor, rows_SK: Tensor, dtype: torch.dtype
    ) -> "Block":
        """Negative numbers in `rows` mark unused places; T is at least 1."""
        unused_SK = rows_SK < 0
        some_unused = bool(unused_SK.any())
        if some_unused:
            rows_SK = rows_SK.clamp(min=0)
        flat = rows_SK.flatten()
        c, k_rope = (x.index_select(0, flat).unflatten(0, rows_SK.shape).to(dtype) for x in (c_TC, k_rope_TR))
        if some_unused:
            # 0 · NaN is NaN: what stands in an unused place must be a number.
            c.masked_fill_(unused_SK[..., None], 0.0)
            k_rope.masked_fill_(unused_SK[..., None], 0.0)
        return cls(q_SHC.to(dtype), q_rope_SHR.to(dtype), c, k_rope, rows_SK, unused_SK if some_unused else None)

    def scores(self, scale: float) -> Tensor:
        """scale · (q·c + q_rope·k_rope) [S, H, K]; −∞ in unused places."""
        scores_SHK = torch.bmm(self.q_SHC, self.c_SKC.transpose(1, 2))
        k_rope_SRK = self.k_rope_SKR.transpose(1, 2)
        scores_SHK = torch.baddbmm(scores_SHK, self.q_rope_SHR, k_rope_SRK, beta=scale, alpha=scale)
        return scores_SHK if self.unused_SK is None else scores_SHK.masked_fill_(self.unused_SK[:, None], float("-inf"))

    def gradients(self, p_SHK: Tensor, grad_SHC: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of q and q_rope [S, H, ·], and what each place gives to its row's c and k_rope [S, K, ·].

        ds = p ⊙ (do cᵀ − rowsum(p ⊙ do cᵀ)); a latent is key and value, so dc = scale · dsᵀ q + pᵀ do. A sink, whose
        value is zero, changes nothing in it. `p` is 0 in unused places, which thus give zeros.
        """
        grad_p = torch.bmm(grad_SHC, self.c_SKC.transpose(1, 2))
        flow_SHK = torch.ops.aten._softmax_backward_data(grad_p, p_SHK, -1, p_SHK.dtype).mul_(scale)
        flow_SKH = flow_SHK.transpose(1, 2)
        into_c = torch.bmm(flow_SKH, self.q_SHC).baddbmm_(p_SHK.transpose(1, 2), grad_SHC)
        into_k_rope = torch.bmm(flow_SKH, self.q_rope_SHR)
        return torch.bmm(flow_SHK, self.c_SKC), torch.bmm(flow_SHK, self.k_rope_SKR), into_c, into_k_rope

    def add_to_rows(self, total_TC: Tensor, into_SKC: Tensor) -> None:
        """total_r += what the places give that name row r, in their order."""
        total_TC.index_add_(0, self.rows_SK.flatten(), into_SKC.flatten(0, 1).to(total_TC.dtype))
