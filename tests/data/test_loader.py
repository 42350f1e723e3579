import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nautile.core.errors import UserError
from nautile.data.loader import Loader, count_windows, read_rows, sequential_windows

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def first_ids(loader, batches):
    return [int(row[0]) for _ in range(batches) for row in loader.next_batch().tokens_BW]


@FEW
@given(tokens=st.integers(30, 200), window=st.integers(2, 8), seed=st.integers(0, 3))
def test_an_epoch_has_every_token_as_a_target_once(write_stream, tokens, window, seed):
    loader = Loader(write_stream(tokens), batch_size=1, window=window, seed=seed)
    for _ in range(2):
        rows = [loader.next_batch().tokens_BW[0] for _ in range(loader.num_windows)]
        targets = sorted(token for row in rows for token in row[1:].tolist())
        assert targets == list(range(1, loader.num_windows * (window - 1) + 1))
        assert tokens - 1 - len(targets) < window - 1  # only a rest shorter than a window is left out
        assert all(row.tolist() == list(range(int(row[0]), int(row[0]) + window)) for row in rows)
    assert loader.epochs == 2


def test_order_depends_on_seed_and_epoch(write_stream):
    shards = write_stream(401)
    orders = []
    for seed in (0, 0, 1):
        loader = Loader(shards, 4, 5, seed)
        orders.append((first_ids(loader, 25), first_ids(loader, 25)))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0][0] != orders[0][1]
    assert sorted(orders[0][0]) == sorted(orders[0][1]) != orders[0][0]


@FEW
@given(before=st.integers(0, 40), after=st.integers(1, 40), batch_size=st.integers(1, 5))
def test_resuming_goes_on_exactly(write_stream, before, after, batch_size):
    """Across the ends of epochs, too: 20 windows, up to 400 samples."""
    shards = write_stream(81)
    whole = Loader(shards, batch_size, 5, seed=7)
    expected = first_ids(whole, before + after)[before * batch_size :]
    stopped = Loader(shards, batch_size, 5, seed=7)
    first_ids(stopped, before)
    resumed = Loader(shards, batch_size, 5, seed=7)
    resumed.restore(stopped.state())
    assert first_ids(resumed, after) == expected


@FEW
@given(world_size=st.integers(1, 4), steps=st.integers(1, 12))
def test_ranks_share_the_samples_of_one_stream(write_stream, world_size, steps):
    """12 rows a step, by however many ranks: the same rows, and one may go on where the others stopped."""
    shards = write_stream(101)
    rows = 12 // world_size
    ranks = [Loader(shards, rows, 5, 3, rank, world_size) for rank in range(world_size)]
    together = [[row for rank in ranks for row in first_ids(rank, 1)] for _ in range(steps)]
    alone = Loader(shards, rows * world_size, 5, 3)
    assert [first_ids(alone, 1) for _ in range(steps)] == together
    assert {str(rank.state()) for rank in ranks} == {str(alone.state())}
    other = Loader(shards, 6, 5, 3, rank=1, world_size=2)
    other.restore(ranks[0].state())
    expected = first_ids(alone, 1)
    if rows * world_size == 12:
        assert first_ids(other, 1) == expected[6:]


def test_document_starts_are_placed_in_the_flattened_inputs(write_shards):
    shards = write_shards([[0] * 3, [1] * 4, [2] * 6])  # starts at 0, 3, 7
    batch = read_rows(shards, [0, 4, 8], window=5)
    assert batch.tokens_BW.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 2, 2], [2, 2, 2, 2, 2]]
    # Row 1 begins at token 4: its own start, and the document at token 7.
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 7, 8, 12]
    assert batch.tokens_BW.dtype == batch.cu_seqlens.dtype == torch.int64


def test_a_document_start_that_is_only_a_target_is_no_boundary(write_shards):
    shards = write_shards([[0] * 4, [1] * 4])
    assert read_rows(shards, [0], window=5).cu_seqlens.tolist() == [0, 4]


@FEW
@given(
    tokens=st.integers(8, 100), window=st.integers(2, 8), limit=st.none() | st.integers(1, 9), rows=st.integers(1, 4)
)
def test_validation_scores_every_token_at_most_once_in_order(write_stream, tokens, window, limit, rows):
    shards = write_stream(tokens)
    batches = list(sequential_windows(shards, window, limit, rows))
    targets = [token for batch in batches for row in batch.tokens_BW for token in row[1:].tolist()]
    windows = min(limit or tokens, count_windows(shards, window))
    assert targets == list(range(1, windows * (window - 1) + 1))
    assert [len(batch.tokens_BW) for batch in batches[:-1]] == [rows] * (len(batches) - 1)


def test_exactly_one_batch_is_enough(write_stream):
    assert Loader(write_stream(17), batch_size=4, window=5, seed=0).num_windows == 4
    with pytest.raises(UserError, match="holds 16 tokens, but 4 rows of 5 need 17") as refused:
        Loader(write_stream(16), batch_size=4, window=5, seed=0)
    assert "give more text" in refused.value.cure
    with pytest.raises(UserError, match="need 17"):  # all ranks together
        Loader(write_stream(16), batch_size=2, window=5, seed=0, world_size=2)
    with pytest.raises(UserError, match="holds 4 tokens, but 1 row of 5 needs 5"):
        sequential_windows(write_stream(4), window=5)


@pytest.mark.parametrize(
    ("other", "named"),
    [({"seed": 2}, "seed was 1 and is 2"), ({"window": 6}, "window was 5 and is 6")],
)
def test_a_position_in_another_order_is_refused(write_stream, other, named):
    shards = write_stream(101)
    state = Loader(shards, 2, 5, 1).state()
    with pytest.raises(UserError, match=named):
        Loader(shards, 2, **{"window": 5, "seed": 1, **other}).restore(state)
    with pytest.raises(UserError, match="tokens was 101 and is 102"):
        Loader(write_stream(102), 2, 5, 1).restore(state)
