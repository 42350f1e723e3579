"""One tile of indexer products, shared by every kernel that scores keys, and the sizes of such tiles.

Keys are the rows of the product and query heads its columns: the sum over a query's heads then runs along columns, of
which a thread of a tensor-core tile holds a quarter itself.

X = BLOCK_S · BLOCK_J: BLOCK_S queries with all their heads, J rounded up to a power of two.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from nautile.ops.triton.support import next_power_of_two


class Tile(NamedTuple):
    """Sizes of one tile. Queries with many heads come alone, so that a tile keeps its products in registers."""

    queries: int
    keys: int
    heads: int
    width: int


def tile_for(J: int, I: int, columns: int = 128, keys: int = 64) -> Tile:  # noqa: E741
    """About `columns` query heads beside `keys` keys; heads and width at least what ``tl.dot`` takes (16, FP8: 32)."""
    heads = max(16, next_power_of_two(J))
    return Tile(max(1, columns // heads), keys, heads, max(32, next_power_of_two(I)))


def scoring(J: int, I: int, element_size: int) -> tuple[Tile, dict[str, int]]:  # noqa: E741
    """Tile of a kernel that scores keys and nothing else, and how it is launched.

    Tensor cores do not take float32 as it is: its products are made one by one from registers, which a tile of the
    usual size overflows.
    """
    if element_size > 2:
        return tile_for(J, I, columns=64, keys=32), {"num_warps": 8, "num_stages": 2}
    return tile_for(J, I), {"num_warps": 4, "num_stages": 3}


@triton.jit
def load_queries(q, s, S, J, I, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr):  # noqa: E741
    """[X, BLOCK_I] of a contiguous [S, J, I] from query `s` on; 0 where there is nothing."""
    x = tl.arange(0, BLOCK_S * BLOCK_J)
    i = tl.arange(0, BLOCK_I)
    row, head = s + x // BLOCK_J, x % BLOCK_J
    offset = (row.to(tl.int64) * J + head)[:, None] * I + i[None, :]
    return tl.load(q + offset, mask=((row < S) & (head < J))[:, None] & (i < I)[None, :], other=0.0)


@triton.jit
def load_weights(weights, s, S, J, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr):
    """[X] of a contiguous [S, J], 0 where there is nothing."""
    x = tl.arange(0, BLOCK_S * BLOCK_J)
    row, head = s + x // BLOCK_J, x % BLOCK_J
    return tl.load(weights + row.to(tl.int64) * J + head, mask=(row < S) & (head < J), other=0.0)


@triton.jit
def load_keys(k, t, end, I, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr):  # noqa: E741
    """[BLOCK_T, BLOCK_I] of a contiguous [T, I] from key `t` on, none from `end` on; 0 where there is nothing."""
    row = t + tl.arange(0, BLOCK_T)
    i = tl.arange(0, BLOCK_I)
    offset = row.to(tl.int64)[:, None] * I + i[None, :]
    return tl.load(k + offset, mask=(row < end)[:, None] & (i < I)[None, :], other=0.0)


@triton.jit
def products(k, q):
    """relu(k qᵀ) as float32 [BLOCK_T, X]. A NaN stays one."""
    dots = tl.dot(k, tl.trans(q), input_precision="ieee")
    return tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def weighted(k, q, w, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr):
    """Σ_j w_sj · relu(q_sj · k_t), float32 [BLOCK_T, BLOCK_S]."""
    return tl.sum(tl.reshape(products(k, q) * w[None, :], (BLOCK_T, BLOCK_S, BLOCK_J)), axis=2)
