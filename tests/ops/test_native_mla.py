"""Absorbed decode in C++ against the naive formula, with each instruction set that this machine can play."""

import ctypes
from collections.abc import Iterator

import ops_naive as naive
import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.core import jit
from nautile.ops.cpu import mla_decode

pytestmark = pytest.mark.skipif(jit.why_no_cxx() is not None, reason=str(jit.why_no_cxx()))

INSTRUCTIONS = {
    "native": (),
    "avx512": ("-mno-avx512bf16", "-O1"),
    "avx2": ("-mno-avx512f", "-O1"),
    "plain": ("-march=x86-64", "-O1"),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}

# B, S, H, C, R, T: whole chunks and none, one vector of queries and several, fewer rows than a tile and several tiles.
SHAPES = [
    (1, 1, 16, 64, 32, 100),
    (3, 2, 5, 40, 7, 131),
    (2, 1, 33, 70, 16, 1),
    (1, 3, 16, 96, 32, 250),
    (4, 1, 1, 1, 1, 49),
    (1, 1, 128, 33, 2, 53),
]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    B, S, H, C, R, T = shape
    g = torch.Generator().manual_seed(seed)
    q, q_rope, c, k_rope = (
        torch.randn(*size, generator=g) for size in ((B, S, H, C), (B, S, H, R), (B, T, C), (B, T, R))
    )
    positions = torch.randint(0, T, (B, S), generator=g)
    return *(x.to(dtype) for x in (q, q_rope, c, k_rope)), positions


def wide(q: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, positions: Tensor, scale: float) -> Tensor:
    return naive.latent_attention(*(x.double() for x in (q, q_rope, c, k_rope)), positions, scale)


def assert_near(got: Tensor, want: Tensor) -> None:
    worst = (got.double() - want).abs().max().item()
    assert worst <= TOLERANCE[got.dtype] * max(1.0, want.abs().max().item()), worst


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", list(INSTRUCTIONS))
def test_equals_the_naive_loop(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    monkeypatch.setattr(mla_decode, "FLAGS", INSTRUCTIONS[name])
    arguments = make(shape, dtype)
    assert mla_decode.takes(*arguments[:4])
    with ops.use("cpu"):
        got = ops.latent_attention(*arguments, 0.2)
    assert got.dtype == dtype
    assert_near(got, wide(*arguments, 0.2))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    """Sequences of many lengths, so that pieces begin and end inside of them."""
    q, q_rope, c, k_rope, _ = make((5, 1, 4, 32, 32, 300), torch.float32)
    positions = torch.tensor([[299], [0], [150], [-1], [48]])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got, lse = mla_decode.decode(q, q_rope, c, k_rope, positions, 0.2)
    finally:
        torch.set_num_threads(before)
    assert (got[3] == 0).all() and (lse[3] == float("inf")).all()
    for b in (0, 1, 2, 4):
        one = slice(b, b + 1)
        assert_near(got[one], wide(q[one], q_rope[one], c[one], k_rope[one], positions[one], 0.2))
        t = int(positions[b]) + 1
        scores_HT = 0.2 * (q[b, 0] @ c[b, :t].t() + q_rope[b, 0] @ k_rope[b, :t].t())
        torch.testing.assert_close(lse[b, :, 0], scores_HT.logsumexp(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f32", "bf16"])
def test_blocks_of_a_table_in_any_order_and_views(dtype: torch.dtype) -> None:
    """Rows of c and k_rope side by side in one cache; NaN in blocks that no table names and after the last row."""
    q, q_rope, c, k_rope, positions = make((3, 2, 6, 64, 32, 70), dtype)
    page, W, X = 16, 5, 96
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))[: 3 * W].view(3, W).to(torch.int32)
    cache = torch.full((20, page, X), float("nan"), dtype=dtype)
    table = torch.full_like(order, -7)
    for b in range(3):
        for t in range(int(positions[b].max()) + 1):
            table[b, t // page] = order[b, t // page]
            cache[order[b, t // page], t % page] = torch.cat([c[b, t], k_rope[b, t]])
    q_cat = torch.cat([q, q_rope], -1)
    got, _ = mla_decode.decode(
        q_cat[..., :64], q_cat[..., 64:], cache[..., :64], cache[..., 64:], positions, 0.2, table_BW=table
    )
    assert_near(got, wide(q, q_rope, c, k_rope, positions, 0.2))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_past_the_last_are_not_read(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, q_rope, c, k_rope, positions = make(shape, dtype)
    want = ops.latent_attention(q, q_rope, c, k_rope, positions, 0.2)
    for b in range(shape[0]):
        c[b, int(positions[b].max()) + 1 :] = float("nan")
        k_rope[b, int(positions[b].max()) + 1 :] = float("nan")
    assert torch.equal(ops.latent_attention(q, q_rope, c, k_rope, positions, 0.2), want)


def test_large_scores_neither_overflow_nor_lose_the_largest() -> None:
    q, q_rope, c, k_rope, positions = make((1, 1, 16, 64, 32, 120), torch.float32)
    got = ops.latent_attention(100 * q, q_rope, c, k_rope, positions, 50.0)
    assert_near(got, wide(100 * q, q_rope, c, k_rope, positions, 50.0))


def test_a_nan_that_is_read_shows() -> None:
    q, q_rope, c, k_rope, _ = make((1, 1, 4, 32, 32, 40), torch.bfloat16)
    c[0, 17, 3] = float("nan")
    assert ops.latent_attention(q, q_rope, c, k_rope, torch.tensor([[20]]), 0.2).isnan().any()
    assert not ops.latent_attention(q, q_rope, c, k_rope, torch.tensor([[16]]), 0.2).isnan().any()


def test_rows_and_blocks_that_do_not_exist_are_refused() -> None:
    q, q_rope, c, k_rope, _ = make((1, 1, 4, 32, 32, 40), torch.float32)
    with pytest.raises(ValueError, match="reads row 40"):
        ops.latent_attention(q, q_rope, c, k_rope, torch.tensor([[40]]), 0.2)
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        table = torch.tensor([[1]], dtype=torch.int32)
        mla_decode.decode(q, q_rope, c, k_rope, torch.tensor([[3]]), 0.2, table_BW=table)


def test_what_native_code_does_not_take_runs_as_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Tensor:
        raise AssertionError("native code was called")

    monkeypatch.setattr(mla_decode, "decode", never)
    q, q_rope, c, k_rope, positions = make((1, 2, 4, 8, 4, 20), torch.float32)
    for arguments in (
        tuple(x.double() for x in (q, q_rope, c, k_rope)),
        (q.requires_grad_(), q_rope, c, k_rope),
        (q.detach(), q_rope, c.transpose(1, 2).contiguous().transpose(1, 2), k_rope),
        (q.detach(), q_rope, c.bfloat16(), k_rope.bfloat16()),
    ):
        got = ops.latent_attention(*arguments, positions, 0.2)
        torch.testing.assert_close(got.double(), wide(*arguments, positions, 0.2), atol=1e-2, rtol=1e-2)


# B, S, H, G, X, V, pages, places, table width
PAGED = [(3, 1, 16, 1, 96, 64, 9, 8, 3), (2, 3, 6, 2, 10, 7, 7, 5, 4), (2, 2, 4, 1, 32, 32, 5, 64, 2)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", PAGED, ids=str)
def test_a_paged_cache_equals_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla_decode, "MOST_QUERIES", 7)  # queries go in several portions
    B, S, H, G, X, V, N, P, W = shape
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, S, H, X, generator=g).to(dtype)
    cache = torch.randn(N, P, G, X, generator=g).to(dtype)
    lengths = torch.tensor([1, W * P, 0, P + 1][:B], dtype=torch.int32)
    table = torch.randint(0, N, (B, W), generator=g, dtype=torch.int32)
    arguments = (q, cache, table, lengths, V, 0.2, causal)
    with ops.use("reference"):
        want_o, want_lse = ops.paged_mla_decode(q.double(), cache.double(), *arguments[2:])
    used = torch.zeros(N, P, dtype=torch.bool)
    for b, length in enumerate(lengths.tolist()):
        for t in range(length):
            used[table[b, t // P], t % P] = True
        table[b, -(-length // P) :] = -9
    cache[~used] = float("nan")
    with ops.use("cpu"):
        o, lse = ops.paged_mla_decode(*arguments)
    assert o.dtype == dtype and lse.dtype == torch.float32
    assert_near(o, want_o)
    torch.testing.assert_close(lse, want_lse.float(), atol=1e-5, rtol=1e-5)


@pytest.fixture
def threads_that_are_not_given() -> Iterator[None]:
    """OpenMP runs parallel regions on one thread, however many they ask for."""
    openmp, before = ctypes.CDLL(jit._openmp_of_torch()), torch.get_num_threads()
    levels = openmp.omp_get_max_active_levels()
    torch.set_num_threads(4)
    openmp.omp_set_max_active_levels(0)
    yield
    openmp.omp_set_max_active_levels(levels)
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_that_are_not_given")
def test_fewer_threads_than_asked_for_do_all_the_work() -> None:
    arguments = make((2, 1, 16, 64, 32, 700), torch.float32)
    assert_near(mla_decode.decode(*arguments, 0.1)[0], wide(*arguments, 0.1))


def test_results_are_on_the_cpu_whatever_the_default_device() -> None:
    arguments = make((1, 1, 16, 64, 32, 100), torch.float32)
    with torch.device("meta"):
        assert mla_decode.takes(*arguments[:4])
        o, lse = mla_decode.decode(*arguments, 0.1)
    assert o.is_cpu and lse.is_cpu
