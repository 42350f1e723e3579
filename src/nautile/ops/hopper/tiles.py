"""How large the tiles of an FP8 product are, how many are in flight, and what two blocks share: a pure function.

A model of a Hopper SM in cycles weighs, for each allowed tile, tensor cores against what comes in from L2, times the
number of rounds that the grid takes. Its constants are the machine's published rates, not fitted ones.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from math import gcd

SHARED_LIMIT = 232_448
"""Bytes of shared memory that one block may have: 227 KiB."""
PRODUCTS_PER_CYCLE = 4096
"""FP8 multiply-adds of one SM's tensor cores in a cycle."""
L2_BYTES_PER_CYCLE = 44
"""What one SM gets from L2 in a cycle when all of them ask."""
TILE_OVERHEAD = 1000
"""Cycles a tile costs beside its products: filling the ring and storing."""
MAX_STAGES = 12


class Grouping(IntEnum):
    """What the products' groups are; the values are those of fp8_tiles.cuh."""

    DENSE = 0
    ROWS = 1
    MASKED = 2
    K_GROUPS = 3


class Share(IntEnum):
    """What the two blocks of a cluster load together; without it a cluster is one block."""

    NONE = 0
    A = 1
    B = 2


@dataclass(frozen=True)
class Tile:
    """One way to compile and launch fp8_gemm.cu."""

    block_m: int
    block_n: int
    stages: int
    share: Share
    shared_bytes: int

    @property
    def cluster(self) -> int:
        """Blocks that work on neighbouring tiles."""
        return 1 if self.share == Share.NONE else 2

    @property
    def threads(self) -> int:
        """Loading warpgroup and multiplying ones."""
        return 256 if self.block_m <= 64 else 384


@dataclass(frozen=True)
class Problem:
    """What decides about the tile."""

    m: int
    """Rows; of one group if they are masked."""
    n: int
    k: int
    groups: int
    grouping: Grouping
    alignment: int
    """Groups of rows begin at multiples of it."""
    column_scales: bool
    """B has a scale per row and 128 of K rather than per 128 × 128."""
    tile_store: bool
    """D leaves through shared memory, as bfloat16."""
    out_bytes: int


@cache
def choose(problem: Problem, sms: int) -> Tile:
    """The tile of least estimated time on `sms` multiprocessors; of equals, the one with the largest blocks."""
    return min(candidates(problem), key=lambda tile: (cycles(problem, tile, sms), -tile.block_m * tile.block_n))


def candidates(problem: Problem) -> list[Tile]:
    """Every tile that the kernel can be compiled with for this product."""
    found: list[Tile] = []
    for block_m in _heights(problem):
        for block_n in range(16, 193, 16):
            if not _fits_registers(block_m, block_n, problem) or not _fits_scales(block_n, problem):
                continue
            stages = min(MAX_STAGES, (SHARED_LIMIT - _d_bytes(problem, block_m, block_n)) // _stage(block_m, block_n))
            if stages < 3:
                continue
            for share in Share:
                if share == Share.B and problem.grouping in (Grouping.ROWS, Grouping.MASKED):
                    continue  # neighbours along M have different groups, or end at different rows
                if share == Share.A and block_m < 64:
                    continue
                shared = _d_bytes(problem, block_m, block_n) + stages * _stage(block_m, block_n)
                found.append(Tile(block_m, block_n, stages, share, shared))
    return found


def cycles(problem: Problem, tile: Tile, sms: int) -> float:
    """Estimated time of the whole product."""
    k_blocks = problem.k / 128 / (problem.groups if problem.grouping == Grouping.K_GROUPS else 1)
    slabs = max(tile.block_m, 64)
    tensor = slabs * tile.block_n * 128 / PRODUCTS_PER_CYCLE
    if tile.block_m <= 64:  # one warpgroup: nobody multiplies while it adds up
        tensor += tile.block_n / 2 + 64
    rows_a = min(tile.block_m, problem.m) / (2 if tile.share == Share.A else 1)
    rows_b = min(tile.block_n, problem.n) / (2 if tile.share == Share.B else 1)
    loads = (rows_a + rows_b) * 128 / L2_BYTES_PER_CYCLE
    stores = tile.block_m * tile.block_n * problem.out_bytes / L2_BYTES_PER_CYCLE / 2
    overhead = TILE_OVERHEAD * (1.2 if tile.cluster > 1 else 1.0)
    rounds = -(-units(problem, tile) // (sms // tile.cluster))
    return rounds * (k_blocks * max(tensor, loads) + stores + overhead)


def units(problem: Problem, tile: Tile) -> int:
    """What there is to do, in pieces that a cluster does at once; an upper bound for masked rows."""
    m = -(-problem.m // (tile.block_m * (2 if tile.share == Share.B else 1)))
    n = -(-problem.n // (tile.block_n * (2 if tile.share == Share.A else 1)))
    return m * n * (problem.groups if problem.grouping in (Grouping.MASKED, Grouping.K_GROUPS) else 1)


def grid(problem: Problem, tile: Tile, sms: int) -> int:
    """Blocks to launch: whole clusters, no more than run at once, and no more than there is work for."""
    return tile.cluster * min(units(problem, tile), sms // tile.cluster)


def band(tile: Tile) -> int:
    """Tiles along M after which a sweep moves on along N: about 1024 rows, whose A stays in L2 meanwhile."""
    return max(1, 1024 // (tile.block_m * (2 if tile.share == Share.B else 1)))


def _heights(problem: Problem) -> tuple[int, ...]:
    tall = (64, 128, 256) if problem.tile_store and not problem.column_scales else (64, 128)
    if problem.grouping == Grouping.ROWS:
        return tuple(height for height in (16, 32, *tall) if problem.alignment % height == 0)
    if problem.grouping == Grouping.K_GROUPS:
        return (64, 128)
    low = tuple(height for height in (16, 32) if problem.m <= height)
    return low or tuple(height for height in tall if height == 64 or problem.m > height // 2)


def _fits_registers(block_m: int, block_n: int, problem: Problem) -> bool:
    """A thread holds its part of a slab's sum and of every slab's total."""
    if problem.column_scales and block_n > 160:
        return False
    return block_n <= 128 if block_m == 256 else block_n <= 192


def _fits_scales(block_n: int, problem: Problem) -> bool:
    """The kernel holds two blocks of 128 columns' scales, wherever the tile begins."""
    return problem.column_scales or 128 % block_n == 0 or 128 - gcd(block_n, 128) + block_n <= 256


def _stage(block_m: int, block_n: int) -> int:
    """Bytes of one stage: A, B, their scales (as if per column) and two barriers."""
    slabs = max(block_m, 64)
    return slabs * 128 + block_n * 128 + 4 * slabs + 4 * max(block_n, 2) + 16


def _d_bytes(problem: Problem, block_m: int, block_n: int) -> int:
    return max(block_m, 64) * block_n * 2 if problem.tile_store else 0
