"""Aligned segments: both ways to say where groups lie, against loops."""

import pytest
import torch

from nautile.ops import group_layout as layout

COUNTS = [[], [0], [1], [128], [5, 0, 200, 128], [0, 0, 7], [300, 1, 0]]


def loops(counts: list[int], M: int, alignment: int) -> tuple[list[int], list[int], list[int]]:
    """Starts, ends and the group of every row, one row at a time."""
    starts, ends, rows, at = [], [], [-1] * M, 0
    for group, count in enumerate(counts):
        while at % alignment:
            at += 1
        starts.append(at)
        for _ in range(count):
            rows[at] = group
            at += 1
        ends.append(at)
    return starts, ends, rows


@pytest.mark.parametrize("alignment", [1, 16, 128])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_starts_ends_and_rows(counts: list[int], alignment: int) -> None:
    M = sum(layout.aligned(n, alignment) for n in counts) + 3
    starts, ends, rows = loops(counts, M, alignment)
    ends_G = layout.ends_of(torch.tensor(counts, dtype=torch.int64), alignment)
    assert ends_G.dtype == torch.int32
    assert ends_G.tolist() == ends
    assert layout.starts_of(ends_G, alignment).tolist() == starts
    groups_M = layout.rows_of(ends_G, M, alignment)
    assert groups_M.dtype == torch.int32
    assert groups_M.tolist() == rows
    assert layout.spans(ends_G, alignment) == list(zip(starts, ends, strict=True))
    layout.check_ends("op", ends_G, M, alignment)
    layout.check_rows("op", groups_M, len(counts), alignment)


def test_runs_leave_padding_out_and_keep_order() -> None:
    assert layout.runs(torch.tensor([2, 2, -1, 0, -1, -1, 2])) == [(2, 0, 2), (0, 3, 4), (2, 6, 7)]
    assert layout.runs(torch.tensor([], dtype=torch.int32)) == []
    assert layout.runs(torch.tensor([-1, -1])) == []


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([0, 3], "groups in [0, 3) or -1 for padding, got 0 to 3"),
        ([-2, 0], "got -2 to 0"),
        ([0] * 8 + [1] * 8, "rows 0 to 15 mix groups [0, 1]; begin each group at a multiple of 16"),
        ([-1] * 8 + [1] * 8, "rows 0 to 15 mix groups [-1, 1]"),
        ([0] * 16 + [2, 1], "rows 16 to 17 mix groups [1, 2]"),
    ],
)
def test_rows_that_no_kernel_could_take(rows: list[int], told: str) -> None:
    with pytest.raises(ValueError) as error:
        layout.check_rows("op", torch.tensor(rows, dtype=torch.int32), 3, 16)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ([5, 9], "group 1 ends at row 9, before it begins at row 16, the multiple of 16 after group 0"),
        ([-1, 16], "group 0 ends at row -1"),
        ([5, 41], "the last group ends at row 41 of 40"),
    ],
)
def test_ends_that_do_not_follow_one_another(ends: list[int], told: str) -> None:
    with pytest.raises(ValueError) as error:
        layout.check_ends("op", torch.tensor(ends, dtype=torch.int32), 40, 16)
    assert told in str(error.value)


def test_alignment() -> None:
    layout.check_alignment("op", 256, 128)
    for wrong in (0, -16, 24):
        with pytest.raises(ValueError, match=f"positive multiple of 16, got {wrong}"):
            layout.check_alignment("op", wrong, 16)
