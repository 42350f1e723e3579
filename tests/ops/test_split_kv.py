"""The schedule of splits: every block once and in order, no worker with more than its share, the same on a device."""

import random

import pytest
import torch

from nautile import ops
from nautile.ops.dispatch import TABLE
from nautile.ops.split_kv import (
    BLOCK,
    OVERHEAD,
    dense_parts,
    list_splits,
    sparse_length,
    sparse_parts,
    split_requests,
)

LENGTHS = (0, 1, 63, 64, 65, 128, 4096)


def random_work(rng: random.Random) -> tuple[list[int], int]:
    lengths = [rng.choice([*LENGTHS, rng.randint(0, 300), rng.randint(0, 9000)]) for _ in range(rng.randint(1, 40))]
    return lengths, rng.randint(1, 140)


def blocks(length: int) -> int:
    return -(-length // BLOCK)


@pytest.mark.parametrize("seed", range(40))
def test_every_block_is_covered_once_and_nobody_has_more_than_a_share(seed: int) -> None:
    lengths, parts = random_work(random.Random(seed))
    splits, ends = list_splits(lengths, parts)
    assert ends[0] == 0 and ends[-1] == len(splits) <= len(lengths) + parts
    for b, length in enumerate(lengths):
        mine = splits[ends[b] : ends[b + 1]]
        assert mine and {request for request, _, _ in mine} == {b}
        covered = [block for _, first, end in mine for block in range(first, end)]
        assert covered == list(range(blocks(length)))
    work, _ = split_requests(lengths, parts)
    share = -(-sum(max(1, blocks(length)) + OVERHEAD for length in lengths) // parts) + OVERHEAD
    loads = [0] * parts
    for i, part in enumerate(work):
        for request in range(part.first_request, part.last_request + 1):
            first = part.first_block if request == part.first_request else 0
            end = part.end_block if request == part.last_request else blocks(lengths[request])
            loads[i] += max(1, end - first) + OVERHEAD
    assert len(work) == parts and max(loads) <= share


@pytest.mark.parametrize("seed", range(20))
def test_records_say_who_shares_a_request(seed: int) -> None:
    lengths, parts = random_work(random.Random(seed))
    work, ends = split_requests(lengths, parts)
    for part in work:
        first, last = part.first_request, part.last_request
        assert len(part.record()) == 8 and part.record()[:5] == [
            first, last, part.first_block, part.end_block, part.first_split
        ]  # fmt: skip
        if first > last:
            assert first == len(lengths)  # an idle worker
            continue
        assert part.first_is_split == (ends[first + 1] - ends[first] > 1)
        assert part.last_is_split == (ends[last + 1] - ends[last] > 1 and (last == first or last_is_cut(part, lengths)))


def last_is_cut(part, lengths: list[int]) -> bool:
    return part.end_block != blocks(lengths[part.last_request])


def test_a_small_schedule_by_hand() -> None:
    """21 blocks and 3 × 5 overhead on two workers: 18 + 5 each. The first does 1 + 5, 5 + 5, and 2 + 5 of the last."""
    work, ends = split_requests([64, 5 * 64, 15 * 64 - 1], 2)
    assert ends == [0, 1, 2, 4]
    assert [part.record() for part in work] == [[0, 2, 0, 2, 0, 0, 1, 0], [2, 2, 2, 15, 1, 1, 1, 0]]


def test_workers_of_a_gpu() -> None:
    assert [dense_parts(132, 1, heads, groups) for heads, groups in ((16, 1), (64, 1), (128, 1), (128, 2))] == [
        132, 132, 66, 66
    ]  # fmt: skip
    assert dense_parts(132, 4, 128) == 16 and dense_parts(4, 8, 128, 4) == 1
    assert (sparse_parts(132, 2, 128), sparse_parts(132, 1, 1), sparse_parts(1, 3, 64)) == (33, 132, 1)
    assert (sparse_length(0), sparse_length(70), sparse_length(0, 5), sparse_length(70, 5)) == (1, 70, 69, 133)


@pytest.mark.parametrize("backend", TABLE["plan_splits"][1])
@pytest.mark.parametrize(
    ("lengths", "parts"), [([0], 1), ([1], 3), ([100, 0, 5000], 4), ([64] * 130, 7), ([0, 0, 0], 5), ([9000, 3], 132)]
)
def test_plans(backend: str, lengths: list[int], parts: int) -> None:
    with ops.use(backend):
        plan = ops.plan_splits(torch.tensor(lengths, dtype=torch.int32), parts)
    splits, ends = list_splits(lengths, parts)
    rows = [list(split) for split in splits] + [[-1, 0, 0]] * (len(lengths) + parts - len(splits))
    assert plan.table_R3.tolist() == rows and plan.ends_B.tolist() == ends
    assert plan.table_R3.dtype == plan.ends_B.dtype == torch.int32


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"got torch.int64 \[2\]"):
        ops.plan_splits(torch.tensor([1, 2]), 3)
    with pytest.raises(ValueError, match="0 parts"):
        ops.plan_splits(torch.tensor([1], dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="got 0 and 1"):
        split_requests([], 1)
