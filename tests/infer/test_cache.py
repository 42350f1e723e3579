import pytest
import torch

from nautile.core.context import CacheSpec
from nautile.infer.cache import SMALLEST, KVCache

SPECS = [CacheSpec(paged={"c_kv": (3,), "k_rope": (2,)})] * 2


def entries(B, S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"c_kv": torch.randn(B, S, 3, generator=generator), "k_rope": torch.randn(B, S, 2, generator=generator)}


def test_rows_are_written_at_their_own_positions_and_the_rest_is_zero():
    cache = KVCache(SPECS, batch=2, dtype=torch.float32)
    cache.reserve(5)
    new = entries(2, 1)
    rows = cache.update(1, torch.tensor([[4], [1]]), **new)
    assert rows["c_kv"].shape == (2, 5, 3) and rows["k_rope"].shape == (2, 5, 2)
    torch.testing.assert_close(rows["c_kv"][0, 4], new["c_kv"][0, 0])
    torch.testing.assert_close(rows["c_kv"][1, 1], new["c_kv"][1, 0])
    assert rows["c_kv"].count_nonzero() == 6  # nothing else, and no NaN from unwritten memory
    assert cache.layers[0]["c_kv"].count_nonzero() == 0


def test_growing_keeps_what_is_there():
    cache = KVCache(SPECS, batch=1, dtype=torch.float32)
    written = []
    for start in range(0, 3 * SMALLEST, SMALLEST // 2):
        cache.reserve(start + SMALLEST // 2)
        written.append(entries(1, SMALLEST // 2, seed=start)["c_kv"])
        rows = cache.update(0, torch.arange(start, start + SMALLEST // 2)[None], c_kv=written[-1])
        torch.testing.assert_close(rows["c_kv"], torch.cat(written, dim=1))
    assert 3 * SMALLEST <= cache.capacity <= 6 * SMALLEST


def test_a_row_is_a_view_and_keep_reorders():
    cache = KVCache(SPECS, batch=3, dtype=torch.float32)
    new = entries(3, 4)
    for row in range(3):
        one = cache.row(row)
        one.reserve(4)
        got = one.update(0, torch.arange(4)[None], c_kv=new["c_kv"][row : row + 1])
        torch.testing.assert_close(got["c_kv"], new["c_kv"][row : row + 1])
    cache.keep([2, 0])
    torch.testing.assert_close(cache.layers[0]["c_kv"][:, :4], new["c_kv"][[2, 0]])


def test_entries_of_any_name_are_kept_and_state_is_refused():
    specs = [CacheSpec(paged={"k": (2, 3), "v": (2, 4), "index_k": (5,)}), CacheSpec(paged={"c_kv": (3,)})]
    cache = KVCache(specs, batch=1, dtype=torch.float32)
    cache.reserve(2)
    rows = cache.update(0, torch.tensor([[1]]), k=torch.ones(1, 1, 2, 3), v=torch.ones(1, 1, 2, 4))
    assert {name: tuple(entry.shape) for name, entry in rows.items()} == {
        "k": (1, 2, 2, 3),
        "v": (1, 2, 2, 4),
        "index_k": (1, 2, 5),
    }
    with pytest.raises(AssertionError, match="conv"):
        KVCache([CacheSpec(paged={}, state={"conv": (3, 4)})], batch=1, dtype=torch.float32)
