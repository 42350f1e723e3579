"""The choice of tiles: within the machine's limits for every product, and sensible for the ones that matter."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.ops.hopper.tiles import SHARED_LIMIT, Grouping, Problem, Share, candidates, choose, grid, units

SMS = 132
DENSE = Problem(4096, 7168, 2048, 1, Grouping.DENSE, 128, column_scales=False, tile_store=True, out_bytes=2)

problems = st.builds(
    Problem,
    m=st.integers(1, 40_000),
    n=st.integers(1, 40_000),
    k=st.integers(1, 200).map(lambda blocks: blocks * 128),
    groups=st.integers(1, 300),
    grouping=st.sampled_from(Grouping),
    alignment=st.sampled_from([16, 48, 64, 128, 192, 256]),
    column_scales=st.booleans(),
    tile_store=st.booleans(),
    out_bytes=st.sampled_from([2, 4]),
)


@settings(max_examples=150, deadline=None)
@given(problems, st.integers(2, 200))
def test_every_product_has_a_tile_within_the_limits(problem: Problem, sms: int) -> None:
    tile = choose(problem, sms)
    assert tile in candidates(problem)
    assert tile.shared_bytes <= SHARED_LIMIT
    assert tile.stages >= 3
    accumulators = tile.block_n // 2 * (1 + max(1, tile.block_m // 128))
    assert accumulators <= 192
    blocks = grid(problem, tile, sms)
    assert 0 < blocks <= sms and blocks % tile.cluster == 0
    assert blocks // tile.cluster <= units(problem, tile)
    if problem.grouping == Grouping.ROWS:
        assert problem.alignment % tile.block_m == 0
        assert tile.share != Share.B
    if problem.grouping == Grouping.MASKED:
        assert tile.share != Share.B
    if not problem.column_scales:  # a tile's columns touch at most two scales, wherever it begins
        for first in range(0, 128 * tile.block_n, tile.block_n):
            assert (first + tile.block_n - 1) // 128 - first // 128 <= 1


@settings(max_examples=60, deadline=None)
@given(problems)
def test_units_cover_the_result(problem: Problem) -> None:
    tile = choose(problem, SMS)
    per_unit = tile.block_m * tile.block_n * tile.cluster
    repeated = problem.groups if problem.grouping in (Grouping.MASKED, Grouping.K_GROUPS) else 1
    assert units(problem, tile) * per_unit >= problem.m * problem.n * repeated


def test_large_products_have_two_warpgroups_and_share_a_factor() -> None:
    for n, k in [(7168, 2048), (4096, 7168), (24576, 1536), (7168, 16384)]:
        tile = choose(replace(DENSE, n=n, k=k), SMS)
        assert tile.threads == 384 and tile.cluster == 2
        assert tile.block_m * tile.block_n >= 128 * 128


def test_few_rows_use_low_tiles_on_many_multiprocessors() -> None:
    tile = choose(replace(DENSE, m=1, n=7168), SMS)
    assert tile.block_m == 16
    assert grid(replace(DENSE, m=1, n=7168), tile, SMS) > 100


@pytest.mark.parametrize("alignment", [16, 32, 64, 128, 256])
def test_a_tile_never_crosses_groups_of_rows(alignment: int) -> None:
    rows = replace(DENSE, grouping=Grouping.ROWS, alignment=alignment, groups=8)
    assert alignment % choose(rows, SMS).block_m == 0
