"""Where the rows of several groups lie in one matrix: segments that begin at multiples of an alignment.

A grouped product cuts its rows into tiles, and a tile belongs to one group only if every segment begins at a tile's
first row. The rows between a segment's end and the next one's beginning are padding. Two ways to say it, as DeepGEMM's:

- *rows*: int32 [M], the group of each row, −1 for padding;
- *ends* ("psum"): int32 [G], the row after the last one of each group. Group i begins at the multiple of the alignment
  at or after the end of group i − 1, group 0 at row 0, so an empty group ends where it begins.

G groups, M rows.
"""

import torch
from torch import Tensor

ALIGNMENT = 128
"""Rows that a segment begins at a multiple of: the tallest tile, and the block of K that shares a scale in FP8."""


def aligned(rows: int, alignment: int = ALIGNMENT) -> int:
    """The smallest multiple of `alignment` that is ≥ `rows`."""
    return -(-rows // alignment) * alignment


def ends_of(counts_G: Tensor, alignment: int = ALIGNMENT) -> Tensor:
    """int32 [G]: ends of segments of so many rows, laid one after another."""
    filled_G = (counts_G + (alignment - 1)).div(alignment, rounding_mode="floor") * alignment
    return (filled_G.cumsum(0) - filled_G + counts_G).to(torch.int32)


def starts_of(ends_G: Tensor, alignment: int = ALIGNMENT) -> Tensor:
    """int32 [G]: first rows of the segments that end there."""
    after_G = (ends_G + (alignment - 1)).div(alignment, rounding_mode="floor") * alignment
    return torch.cat([after_G.new_zeros(1), after_G[:-1]])[: len(ends_G)].to(torch.int32)


def rows_of(ends_G: Tensor, M: int, alignment: int = ALIGNMENT) -> Tensor:
    """int32 [M]: group of each row, −1 for padding and for rows after the last segment. Waits for no device."""
    row_M = torch.arange(M, device=ends_G.device, dtype=torch.int32)
    if not len(ends_G):
        return torch.full_like(row_M, -1)
    group_M = torch.searchsorted(ends_G, row_M, right=True, out_int32=True)
    start_M = starts_of(ends_G, alignment)[group_M.clamp(max=len(ends_G) - 1)]
    return group_M.masked_fill((group_M == len(ends_G)) | (row_M < start_M), -1)


def runs(groups_M: Tensor) -> list[tuple[int, int, int]]:
    """(group, first row, last row + 1) of neighbouring rows of one group, padding left out; waits for the device."""
    if not len(groups_M):
        return []
    ids, lengths = torch.unique_consecutive(groups_M, return_counts=True)
    stops = lengths.cumsum(0).tolist()
    found = zip(ids.tolist(), [0, *stops], stops, strict=False)
    return [run for run in found if run[0] >= 0]


def spans(ends_G: Tensor, alignment: int = ALIGNMENT) -> list[tuple[int, int]]:
    """(first row, last row + 1) of each group; waits for the device."""
    return list(zip(starts_of(ends_G, alignment).tolist(), ends_G.tolist(), strict=True))


def check_alignment(op: str, alignment: int, step: int) -> None:
    """Raise `ValueError` unless `alignment` is a positive multiple of `step`."""
    if alignment < 1 or alignment % step:
        raise ValueError(f"{op}: alignment must be a positive multiple of {step}, got {alignment}")


def check_rows(op: str, groups_M: Tensor, G: int, alignment: int) -> None:
    """Raise `ValueError` unless the values of `groups_M` are groups or −1, and each tile has one group, rows first."""
    if not len(groups_M):
        return
    low, high = groups_M.aminmax()
    if low < -1 or high >= G:
        raise ValueError(f"{op}: rows must hold groups in [0, {G}) or -1 for padding, got {int(low)} to {int(high)}")
    padding = groups_M.new_full((aligned(len(groups_M), alignment) - len(groups_M),), -1)
    tiles = torch.cat([groups_M, padding]).view(-1, alignment)
    first = tiles[:, :1]
    # Padding only after a tile's rows: kernels look at its first row.
    mixed = ((tiles != first) & (tiles != -1)).any(1)
    if mixed.any():
        start = int(mixed.int().argmax()) * alignment
        found = groups_M[start : start + alignment]
        raise ValueError(
            f"{op}: rows {start} to {start + len(found) - 1} mix groups {found.unique().tolist()}; begin each group at "
            f"a multiple of {alignment} (group_layout.ends_of), or give the alignment that yours have"
        )


def check_ends(op: str, ends_G: Tensor, M: int, alignment: int) -> None:
    """Raise `ValueError` unless the segments follow one another within `M` rows."""
    if not len(ends_G):
        return
    starts_G = starts_of(ends_G, alignment)
    if (ends_G < starts_G).any():
        group = int((ends_G < starts_G).int().argmax())
        raise ValueError(
            f"{op}: group {group} ends at row {int(ends_G[group])}, before it begins at row {int(starts_G[group])}, "
            f"the multiple of {alignment} after group {group - 1}"
        )
    if int(ends_G[-1]) > M:
        raise ValueError(f"{op}: the last group ends at row {int(ends_G[-1])} of {M}")
