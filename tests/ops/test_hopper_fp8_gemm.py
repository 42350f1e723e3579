"""fp8_gemm.cu itself, executed on a CPU by the emulator, against the specification."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hopper_cases import operand, poison, tile
from hopper_emulation import run_fp8_gemm
from torch import Tensor

from nautile.core.jit import why_no_cxx
from nautile.ops import group_layout
from nautile.ops.hopper.fp8_plan import HEADERS, SOURCE, plan
from nautile.ops.hopper.tiles import Grouping, Share, Tile
from nautile.ops.numerics import SAME_FP8_DIFF, calc_diff
from nautile.ops.reference import fp8_products as reference

pytestmark = pytest.mark.skipif(why_no_cxx() is not None, reason=str(why_no_cxx()))
SQUARES, ROWS = (128, 128), (1, 128)
BF16_STEP = 2**-7
"""Largest distance of two neighbouring bfloat16: sums in another order may round to either."""
SMS = 4


def assert_close(got: Tensor, want: Tensor) -> None:
    assert not got.isnan().any()
    want = want.to(got.dtype)  # rounded once, as the kernel does
    assert calc_diff(got, want) < SAME_FP8_DIFF
    near = BF16_STEP if got.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, want, rtol=near, atol=near * float(want.abs().max()) / 8)


DENSE = [
    # M, N, K, tile, blocks of b, dtype, with C, what is special
    pytest.param(300, 200, 512, tile(128, 96), SQUARES, torch.bfloat16, False, id="two-scales-in-a-tile"),
    pytest.param(300, 392, 384, tile(128, 192, Share.A), SQUARES, torch.bfloat16, False, id="blocks-share-a"),
    pytest.param(300, 136, 384, tile(256, 128, Share.B), SQUARES, torch.bfloat16, False, id="two-slabs-share-b"),
    pytest.param(1, 200, 1024, tile(16, 32), SQUARES, torch.bfloat16, False, id="one-row"),
    pytest.param(77, 51, 256, tile(128, 64, Share.A), SQUARES, torch.float32, True, id="odd-n-float32-with-c"),
    pytest.param(70, 52, 256, tile(64, 160), ROWS, torch.bfloat16, True, id="scale-per-row-of-b-with-c"),
]


@pytest.mark.parametrize("M, N, K, shape, block, dtype, with_c", DENSE)
def test_dense(M: int, N: int, K: int, shape: Tile, block: tuple, dtype: torch.dtype, with_c: bool) -> None:
    a, b = operand(M, K), operand(N, K, block=block)
    out = torch.full((M, N), float("nan"), dtype=dtype)
    c = torch.randn(M, N).to(dtype) if with_c else None
    run_fp8_gemm(plan(Grouping.DENSE, a, b, out, sms=SMS, c=c, tile=shape), seed=M)
    assert_close(out, reference.fp8_gemm(a, b, c, torch.empty(M, N)))


def test_the_order_in_which_threads_and_copies_run_does_not_matter() -> None:
    a, b = operand(300, 640), operand(200, 640, block=SQUARES)
    outs = []
    for seed in range(4):
        outs.append(torch.full((300, 200), float("nan"), dtype=torch.bfloat16))
        run_fp8_gemm(plan(Grouping.DENSE, a, b, outs[-1], sms=2, tile=tile(128, 96)), seed=seed)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_strided_operands_and_scales() -> None:
    wide, b = operand(130, 768), operand(96, 256, block=SQUARES)
    a = replace(wide, data=wide.data[:, 128:384], scale=wide.scale[:, 1:3].t().contiguous().t())
    out = torch.full((130, 224), 5.0, dtype=torch.bfloat16)
    run_fp8_gemm(plan(Grouping.DENSE, a, b, out[:, 64:160], sms=SMS, tile=tile(128, 96)))
    assert_close(out[:, 64:160], reference.fp8_gemm(a, b, None, torch.empty(130, 96)))
    assert (out[:, :64] == 5).all() and (out[:, 160:] == 5).all()


GROUPS_OF_ROWS = [
    pytest.param([5, 0, 130, 128], 200, 128, tile(128, 96, Share.A), SQUARES, 0, id="shared-a"),
    pytest.param([300, 0, 5], 72, 256, tile(256, 64), SQUARES, 256, id="tail-of-padding"),
    pytest.param([5, 0, 17, 16], 41, 16, tile(16, 64), ROWS, 0, id="groups-of-16"),
]


@pytest.mark.parametrize("counts, N, alignment, shape, block, tail", GROUPS_OF_ROWS)
def test_groups_of_rows(counts: list[int], N: int, alignment: int, shape: Tile, block: tuple, tail: int) -> None:
    ends = group_layout.ends_of(torch.tensor(counts, dtype=torch.int32), alignment)
    M = group_layout.aligned(int(ends[-1]), alignment) + tail
    layout = group_layout.rows_of(ends, M, alignment)
    a, b = operand(M, 256), operand(len(counts), N, 256, block=block)
    poison(a, layout < 0)
    out = torch.full((M, N), float("nan"), dtype=torch.bfloat16)
    run_fp8_gemm(plan(Grouping.ROWS, a, b, out, sms=SMS, layout=layout, alignment=alignment, tile=shape), seed=N)
    assert_close(out, reference.grouped_fp8_gemm(a, b, layout, torch.empty(M, N), alignment))


MASKED = [
    pytest.param([3, 0, 129, 140], 140, 200, tile(128, 96, Share.A), id="shared-a"),
    pytest.param([16, 0, 5], 16, 72, tile(16, 64), id="few-rows"),
    pytest.param([0, 0], 16, 72, tile(16, 64), id="nothing-to-do"),
]


@pytest.mark.parametrize("counts, M, N, shape", MASKED)
def test_masked_rows(counts: list[int], M: int, N: int, shape: Tile) -> None:
    G = len(counts)
    a, b = operand(G, M, 256), operand(G, N, 256, block=SQUARES)
    for g, count in enumerate(counts):
        poison(a, (g, slice(count, None)))
    counts_G = torch.tensor(counts, dtype=torch.int32)
    out = torch.full((G, M, N), 7.0, dtype=torch.bfloat16)
    run_fp8_gemm(plan(Grouping.MASKED, a, b, out, sms=SMS, layout=counts_G, tile=shape), seed=M)
    want = reference.masked_fp8_gemm(a, b, counts_G, torch.full((G, M, N), 7.0))
    assert_close(out, want)
    for g, count in enumerate(counts):
        assert (out[g, count:] == 7).all()


@pytest.mark.parametrize(
    "shape, alignment, with_c",
    [(tile(128, 80), 128, True), (tile(64, 80, Share.B), 256, False)],
    ids=["added-to-c", "fresh"],
)
def test_groups_of_k(shape: Tile, alignment: int, with_c: bool) -> None:
    lengths, M, N = [5, 0, 130, 256], 100, 71
    ends = group_layout.ends_of(torch.tensor(lengths, dtype=torch.int32), alignment)
    K = group_layout.aligned(int(ends[-1]), alignment) + 128
    a, b = operand(M, K), operand(N, K)
    unused = group_layout.rows_of(ends, K, alignment) < 0
    for x in (a, b):
        x.data.view(torch.uint8)[:, unused] = 0x7F
        x.scale[:, unused.view(-1, 128).all(1)] = float("nan")
    c = torch.randn(len(lengths), M, N) if with_c else None
    want = reference.k_grouped_fp8_gemm(a, b, ends, c, torch.empty(len(lengths), M, N), alignment)
    out = c if c is not None else torch.full((len(lengths), M, N), float("nan"))
    run_fp8_gemm(plan(Grouping.K_GROUPS, a, b, out, sms=SMS, layout=ends, c=c, alignment=alignment, tile=shape))
    assert_close(out, want)


FAULTS = {
    "a stage is used before it has arrived": ("barrier_wait(s.full + ring.stage, ring.parity);", ""),
    "a stage is given up before it is multiplied": (
        "product_commit();\n                product_wait<0>(sum);",
        "product_commit();\n                release();\n                product_wait<0>(sum);",
    ),
    "one arrival too few is expected": ("1 + 32);", "1 + 31);"),
    "the result is overwritten while it is stored": ("if (leader) tile_store_wait();", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_finds_faults(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAUTILE_CACHE", str(tmp_path))  # nobody needs the broken one again
    before, after = FAULTS[fault]
    texts = {file.name: file.read_text() for file in (SOURCE, *HEADERS)}
    assert sum(text.count(before) for text in texts.values()) == 1, before
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace(before, after))
    a, b = operand(300, 640), operand(200, 640, block=SQUARES)
    out = torch.full((300, 200), float("nan"), dtype=torch.bfloat16)
    what = plan(Grouping.DENSE, a, b, out, sms=1, tile=tile(128, 96))
    with pytest.raises(AssertionError):
        run_fp8_gemm(what, source=tmp_path / SOURCE.name)
        assert_close(out, reference.fp8_gemm(a, b, None, torch.empty(300, 200)))
