import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nautile.core.errors import NautileError, UserError
from nautile.data.shards import TokenShards

DOCUMENTS = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=20), min_size=1, max_size=12)
SLOW_FOLDERS = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW_FOLDERS
@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 30), data=st.data())
def test_what_is_written_is_read_wherever_the_files_end(write_shards, documents, shard_tokens, data):
    shards = write_shards(documents, shard_tokens=shard_tokens)
    stream = [token for document in documents for token in document]
    start = data.draw(st.integers(0, len(stream)))
    length = data.draw(st.integers(0, len(stream) - start))
    assert shards.window(start, length).tolist() == stream[start : start + length]
    assert [shards.document(index).tolist() for index in range(len(documents))] == documents
    assert shards.num_tokens == len(stream)
    assert shards.num_bytes == sum(token % 4 for token in stream) == shards.count_bytes(np.array(stream))
    begins = np.cumsum([0, *map(len, documents)])[:-1].tolist()
    assert shards.document_starts.tolist() == begins
    inside = [begin - start for begin in begins if start <= begin < start + length]
    assert shards.starts_within(start, length).tolist() == inside


def test_files_are_filled_to_the_brim(write_shards):
    shards = write_shards([list(range(10)), list(range(7))], shard_tokens=6)
    sizes = {file.name: file.stat().st_size // 2 for file in shards.folder.glob("*.bin")}
    assert sizes == {"tokens-00000.bin": 6, "tokens-00001.bin": 6, "tokens-00002.bin": 5}


@pytest.mark.parametrize(("vocab_size", "bytes_per_id"), [(65_536, 2), (65_537, 4)])
def test_the_largest_id_of_either_width_fits(write_shards, vocab_size, bytes_per_id):
    shards = write_shards([[0, vocab_size - 1, 1]], vocab_size=vocab_size)
    assert shards.window(0, 3).tolist() == [0, vocab_size - 1, 1]
    assert (shards.folder / "tokens-00000.bin").stat().st_size == 3 * bytes_per_id


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 6), (5, 1), (0, -1)])
def test_a_window_outside_is_refused(write_shards, start, length):
    with pytest.raises(IndexError):
        write_shards([[1, 2, 3, 4, 5]]).window(start, length)


def test_damage_is_noticed_on_opening(write_shards):
    shards = write_shards([list(range(10))], shard_tokens=6)
    with (shards.folder / "tokens-00001.bin").open("r+b") as file:
        file.truncate(5)
    with pytest.raises(NautileError, match=r"tokens-00001.bin has 5 bytes instead of 8"):
        TokenShards(shards.folder)
    (shards.folder / "tokens-00000.bin").unlink()
    with pytest.raises(NautileError, match=r"tokens-00000.bin has 0 bytes instead of 12"):
        TokenShards(shards.folder)


def test_a_folder_of_something_else_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no prepared tokens"):
        TokenShards(tmp_path)
