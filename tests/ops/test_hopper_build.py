"""The Hopper kernels as nvcc compiles them: no spills, shared memory and registers within the machine's limits."""

import re
import subprocess
from pathlib import Path

import pytest
from hopper_cases import tile

from nautile.core.jit import NVCC_FLAGS, compile_cuda, why_no_nvcc
from nautile.ops.hopper import mla_plan
from nautile.ops.hopper.fp8_plan import HEADERS, KERNEL, SOURCE, Variant
from nautile.ops.hopper.tiles import SHARED_LIMIT, Grouping, Problem, Share, Tile, candidates

pytestmark = pytest.mark.skipif(why_no_nvcc() is not None, reason=str(why_no_nvcc()))

VARIANTS = [
    Variant(tile(128, 128, Share.A), Grouping.DENSE, False, 2, True, False),
    Variant(tile(128, 192, Share.A), Grouping.DENSE, False, 2, True, False),
    Variant(tile(128, 160, Share.B), Grouping.DENSE, False, 2, True, False),
    Variant(tile(128, 112), Grouping.DENSE, False, 4, False, True),
    Variant(tile(256, 128, Share.B), Grouping.DENSE, False, 2, True, False),
    Variant(tile(256, 128, Share.A), Grouping.ROWS, False, 2, True, False),
    Variant(tile(128, 192, Share.A), Grouping.ROWS, False, 2, True, False),
    Variant(tile(128, 192, Share.A), Grouping.MASKED, False, 2, True, False),
    Variant(tile(256, 128, Share.A), Grouping.MASKED, False, 2, True, False),
    Variant(tile(16, 64), Grouping.MASKED, False, 2, True, False),
    Variant(tile(64, 192), Grouping.DENSE, False, 2, True, False),
    Variant(tile(128, 160, Share.B), Grouping.K_GROUPS, True, 4, False, True),
    Variant(tile(128, 160), Grouping.DENSE, True, 4, False, True),
    Variant(tile(128, 160, Share.A), Grouping.ROWS, True, 2, True, False),
]


def compile_verbosely(source: Path, folder: Path, *defines: str) -> str:
    """What nvcc and ptxas say."""
    command = ["nvcc", *NVCC_FLAGS, "-gencode=arch=compute_90a,code=sm_90a", *defines, "-Xptxas", "-v"]
    out = str(folder / "x.cubin")
    done = subprocess.run([*command, str(source), "-o", out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def assert_fits(report: str, threads: int) -> None:
    assert "warning" not in report, report  # among them: serialised wgmma, setmaxnreg ignored
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and set(spills) == {("0", "0")}, report
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", report)]
    assert registers and max(registers) * threads <= 65536, report


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.grouping.name}-{v.tile.block_m}x{v.tile.block_n}")
def test_products_compile_without_spills(variant: Variant, tmp_path: Path) -> None:
    defines = [f"-D{name}={value}" for name, value in variant.defines().items()]
    assert_fits(compile_verbosely(SOURCE, tmp_path, *defines), variant.tile.threads)


def test_decoding_compiles_without_spills(tmp_path: Path) -> None:
    assert_fits(compile_verbosely(mla_plan.SOURCE, tmp_path), 384)
    assert mla_plan.SHARED_BYTES <= SHARED_LIMIT


def test_the_cubin_has_the_kernel() -> None:
    cubin = compile_cuda(SOURCE, *HEADERS, defines=VARIANTS[0].defines())
    assert KERNEL.encode() in cubin.read_bytes()


def test_variants_above_are_the_largest_that_can_be_chosen() -> None:
    def largest(grouping: Grouping, column_scales: bool, tile_store: bool) -> set[tuple[int, int]]:
        problem = Problem(9000, 9000, 4096, 4, grouping, 256, column_scales, tile_store, 2 if tile_store else 4)
        tiles: list[Tile] = candidates(problem)
        return {(t.block_m, max(u.block_n for u in tiles if u.block_m == t.block_m)) for t in tiles if t.block_m > 64}

    compiled = {(v.grouping, v.column_scales, v.tile.block_m, v.tile.block_n) for v in VARIANTS}
    for grouping in (Grouping.DENSE, Grouping.ROWS, Grouping.MASKED):
        for block_m, block_n in largest(grouping, column_scales=False, tile_store=True):
            assert (grouping, False, block_m, block_n) in compiled
