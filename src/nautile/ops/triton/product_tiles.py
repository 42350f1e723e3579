"""How a matrix product is cut into tiles, and what its kernels ask about groups."""

from dataclasses import dataclass

import triton
import triton.language as tl

from nautile.ops.triton import support

DENSE, BY_ROW, COUNTED = 0, 1, 2
"""What a product kernel's layout is: none; the group of each row; the rows used of each batch."""
NEIGHBOURS = tl.constexpr(8)
"""Tiles below each other that run together, so that they read the same columns of the other factor from the cache."""


@dataclass(frozen=True)
class Tiles:
    """Size of one program's part of the result."""

    rows: int
    columns: int
    warps: int

    def count(self, M: int, N: int) -> int:
        """Tiles of an M × N result."""
        return -(-M // self.rows) * -(-N // self.columns)


def dense_tiles(M: int, N: int) -> Tiles:
    """Square tiles; flat ones for few rows, since a tensor core takes at least 16."""
    rows = min(128, max(16, support.next_power_of_two(M)))
    columns = min(128, max(16, support.next_power_of_two(N)))
    return Tiles(rows, columns, 8 if rows * columns > 64 * 128 else 4)


def narrow_tiles(M: int, N: int) -> Tiles:
    """For kernels with a second piece of code for the rest of K, which square tiles leave no registers for."""
    tiles = dense_tiles(M, N)
    return Tiles(tiles.rows, min(64, tiles.columns), 8 if tiles.rows == 128 else 4)


def grouped_tiles(M: int, N: int, alignment: int) -> Tiles:
    """Tiles that belong to one group: their height divides the alignment."""
    tiles = dense_tiles(M, N)
    rows = min(tiles.rows, alignment & -alignment)
    return Tiles(rows, tiles.columns, 8 if rows * tiles.columns > 64 * 128 else 4)


@triton.jit
def tile_of(t, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of tile number t; numbers run down `NEIGHBOURS` tiles, then to the right."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = t // (NEIGHBOURS * across)
    height = tl.minimum(down - band * NEIGHBOURS, NEIGHBOURS)
    inside = t % (NEIGHBOURS * across)
    return (band * NEIGHBOURS + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def stretch(ends, g, alignment):
    """Where group g of `ends` begins and stops."""
    before = tl.load(ends + g - 1, mask=g > 0, other=0)
    return tl.cdiv(before, alignment) * alignment, tl.load(ends + g)
