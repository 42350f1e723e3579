"""Indexer logits over windows and over pages, against loops over scalars; what nobody may read is NaN."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops.dispatch import TABLE
from nautile.ops.index_cache import index_planes
from nautile.ops.index_schedule import paged_schedule
from nautile.ops.numerics import MQA_BF16_DIFF, MQA_DIFF, calc_diff

BACKENDS = TABLE["mqa_logits"][1]
FP8 = torch.float8_e4m3fn
NAN = float("nan")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, so that small inputs take several programs."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from nautile.ops.triton import index_logits as kernels

    monkeypatch.setattr(kernels, "CHUNK", 128)
    monkeypatch.setattr(kernels, "PAGED_CHUNK", 64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """Σ_j w_j relu(q_j · k_t) of one query in float64, key by key."""
    q, weights = q.double(), weights.double()
    k, heads = k.double(), list(zip(weights.tolist(), q, strict=True))
    return torch.tensor([sum(w * max(0.0, float(v @ key)) for w, v in heads) for key in k], dtype=torch.float64)


def window_case(S: int, J: int, width: int, T: int, dtype: torch.dtype) -> dict:
    starts = [max(0, 3 * s - 4) % max(1, T) for s in range(S)]
    ends = [min(T, start + 7 * s) for s, start in enumerate(starts)]  # the first window is empty
    return {
        "q_SJI": normal(S, J, width).to(dtype),
        "k_TI": normal(T, width, seed=1).to(dtype),
        "weights_SJ": normal(S, J, seed=2),
        "start_S": torch.tensor(starts, dtype=torch.int32),
        "end_S": torch.tensor(ends, dtype=torch.int32),
        "k_scale_T": normal(T, seed=3).abs(),
    }


def wanted(case: dict) -> Tensor:
    """float64 [S, T] by loops, −inf outside the windows."""
    S, T = case["q_SJI"].shape[0], case["k_TI"].shape[0]
    out = torch.full((S, T), float("-inf"), dtype=torch.float64)
    keys = case["k_TI"].double() * (1.0 if case["k_scale_T"] is None else case["k_scale_T"].double()[:, None])
    for s, (a, b) in enumerate(zip(case["start_S"].tolist(), case["end_S"].tolist(), strict=True)):
        a, b = max(a, 0), min(b, T)
        if a < b:
            out[s, a:b] = naive(case["q_SJI"][s], keys[a:b], case["weights_SJ"][s])
    return out


def assert_logits(got: Tensor, want: Tensor, bar: float) -> None:
    assert got.shape == want.shape and torch.equal(got == float("-inf"), want == float("-inf"))
    hidden = want == float("-inf")
    assert torch.isfinite(got[~hidden]).all()
    assert calc_diff(got.masked_fill(hidden, 0), want.masked_fill(hidden, 0)) < bar


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 3, 7, 20), FP8), ((3, 32, 32, 300), FP8), ((9, 20, 24, 40), torch.bfloat16), ((4, 2, 5, 9), torch.float32)],
    ids=str,
)
def test_windows(backend: str, shape: tuple, dtype: torch.dtype) -> None:
    case = window_case(*shape, dtype)
    with ops.use(backend):
        got = ops.mqa_logits(**case)
    assert got.dtype == torch.float32 and got.stride(0) * 4 % 1024 == 0
    assert_logits(got, wanted(case), MQA_DIFF)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compressed_columns_count_from_the_start_of_the_window(backend: str) -> None:
    case = window_case(6, 3, 32, 150, FP8)
    case["end_S"][2] = 150
    want, width = wanted(case), int((case["end_S"] - case["start_S"]).max())
    with ops.use(backend):
        got, unclean = ops.mqa_logits(**case, width=width), ops.mqa_logits(**case, width=width, clean=False)
    for s, (a, b) in enumerate(zip(case["start_S"].tolist(), case["end_S"].tolist(), strict=True)):
        n = max(0, b - a)
        assert (got[s, n:] == float("-inf")).all() and torch.equal(got[s, :n], unclean[s, :n])
        torch.testing.assert_close(got[s, :n].double(), want[s, a:b], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_beyond_the_keys_and_keys_of_nobody(backend: str) -> None:
    case = window_case(4, 3, 8, 30, torch.float32)
    case["start_S"], case["end_S"] = (torch.tensor(x, dtype=torch.int32) for x in ([-3, 5, 12, 20], [9, 90, 12, 4]))
    want = wanted(case)
    case["start_S"][1] = 6  # key 5 and those of the others stay; 9..11 are everybody's or nobody's
    want[1, 5] = float("-inf")
    case["end_S"][1] = 9
    want[1, 9:] = float("-inf")
    case["k_TI"][9:], case["k_scale_T"][9:] = NAN, NAN
    torch.use_deterministic_algorithms(True)
    try:
        with ops.use(backend):
            got = ops.mqa_logits(**case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_logits(got, want, MQA_DIFF)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("start", "end"), [(2**31 - 1, 0), (2**31 - 9, 2**31 - 1), (-(2**31), -(2**31) + 4)])
def test_windows_at_the_ends_of_int32_hold_nothing(backend: str, start: int, end: int) -> None:
    case = window_case(1, 3, 8, 30, torch.float32)
    case["start_S"], case["end_S"] = (torch.tensor([x], dtype=torch.int32) for x in (start, end))
    with ops.use(backend):
        for width in (None, 14):
            assert (ops.mqa_logits(**case, width=width) == float("-inf")).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_scale_in_bfloat16_out_and_non_contiguous(backend: str) -> None:
    case = window_case(6, 3, 32, 40, FP8) | {"k_scale_T": None}
    case["q_SJI"] = case["q_SJI"].transpose(0, 1).contiguous().transpose(0, 1)
    case["weights_SJ"] = case["weights_SJ"].t().contiguous().t()
    with ops.use(backend):
        got = ops.mqa_logits(**case, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16 and got.stride(0) * 2 % 1024 == 0
    assert_logits(got, wanted(case), MQA_BF16_DIFF)


def test_reference_in_float64_equals_the_loop() -> None:
    case = window_case(5, 3, 7, 20, torch.float64)
    case["weights_SJ"] = case["weights_SJ"].double()
    want = wanted(case)
    got = ops.mqa_logits(**case, dtype=torch.float64)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries_and_no_keys(backend: str) -> None:
    with ops.use(backend):
        assert ops.mqa_logits(**window_case(0, 3, 8, 5, FP8)).shape == (0, 5)
        assert ops.mqa_logits(**window_case(2, 3, 8, 0, FP8)).shape == (2, 0)
        none = ops.mqa_logits(**window_case(2, 3, 8, 0, FP8), width=3)
    assert (none == float("-inf")).all()


def paged_case(B: int, N: int, J: int, width: int, page: int, lengths: list[list[int]], columns: int) -> dict:
    """Pages in scattered order with room between them; all that the lengths do not reach is NaN or a wild number."""
    longest = [max(row) for row in lengths]
    M = max(-(-n // page) for n in longest) + 1
    bytes_per_page, total = page * (width + 4) + 12, 3 + sum(-(-n // page) for n in longest)
    storage = torch.full((total, bytes_per_page), 0x7F, dtype=torch.uint8)  # e4m3 NaN; as float32 3.4e38
    cache = storage.as_strided((total, page, width + 4), (bytes_per_page, width + 4, 1))
    keys, scales = index_planes(cache, width)
    scales.fill_(NAN)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(7)).tolist()
    pages = torch.full((B, M), 2147480000, dtype=torch.int32)
    for b, n in enumerate(longest):
        for t in range(n):
            if t % page == 0:
                pages[b, t // page] = order.pop()
            keys[pages[b, t // page], t % page] = normal(width, seed=100 + 31 * b + t).to(FP8)
            scales[pages[b, t // page], t % page] = normal(1, seed=500 + 31 * b + t).abs().item()
    return {
        "q_BNJI": normal(B, N, J, width).to(FP8),
        "cache_PYZ": cache,
        "weights_XJ": normal(B * N, J, seed=2),
        "lengths_BN": torch.tensor(lengths, dtype=torch.int32),
        "pages_BM": pages,
        "width": columns,
    }


def paged_wanted(case: dict) -> Tensor:
    B, N, _, width = case["q_BNJI"].shape
    keys, scales = index_planes(case["cache_PYZ"], width)
    page = keys.shape[1]
    out = torch.full((B * N, case["width"]), float("-inf"), dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            length = int(case["lengths_BN"][b, n])
            at = [(int(case["pages_BM"][b, t // page]), t % page) for t in range(length)]
            if at:
                k = torch.stack([keys[p, y].double() * scales[p, y].double() for p, y in at])
                out[b * N + n, :length] = naive(case["q_BNJI"][b, n], k, case["weights_XJ"][b * N + n])
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "lengths", "columns"),
    [
        ((2, 1, 32, 32, 64), [[70], [1]], 100),
        ((3, 2, 3, 16, 8), [[17, 18], [0, 0], [3, 40]], 41),
        ((1, 5, 20, 24, 5), [[9, 1, 0, 12, 11]], 12),
    ],
    ids=["page-64", "two-new-tokens", "odd"],
)
def test_pages(backend: str, shape: tuple, lengths: list, columns: int) -> None:
    case = paged_case(*shape, lengths, columns)
    with ops.use(backend):
        got = ops.paged_mqa_logits(**case)
        unclean = ops.paged_mqa_logits(**case, clean=False, dtype=torch.bfloat16)
    want = paged_wanted(case)
    assert got.stride(0) * 4 % 1024 == 0
    assert_logits(got, want, MQA_DIFF)
    hidden = want == float("-inf")
    assert calc_diff(unclean.float().masked_fill(hidden, 0), want.masked_fill(hidden, 0)) < MQA_BF16_DIFF


def test_the_cache_is_keys_first_then_scales() -> None:
    cache = torch.zeros(2, 4, 12, dtype=torch.uint8)
    keys, scales = index_planes(cache, 8)
    keys.copy_(normal(2, 4, 8).to(FP8))
    scales.copy_(normal(2, 4))
    flat = cache.flatten(1)
    assert torch.equal(flat[:, :32].view(FP8).float(), keys.flatten(1).float())
    assert torch.equal(flat[:, 32:].contiguous().view(torch.float32), scales)


@pytest.mark.parametrize(("new", "workers"), [(1, 1), (1, 5), (2, 3), (3, 4), (6, 40)])
def test_the_schedule_shares_every_item_once(new: int, workers: int) -> None:
    lengths = [600, 0, 1, 256, 257, 0]
    starts = paged_schedule(lengths, new, workers)
    atoms = max(1, -(-new // 2))
    items = [(b * atoms + a, i) for b, n in enumerate(lengths) for a in range(atoms) for i in range(-(-n // 256))]
    assert starts[-1] == (len(lengths) * atoms, 0) and len(starts) == workers + 1
    shares = [sum(a <= item < b for item in items) for a, b in zip(starts, starts[1:], strict=False)]
    assert sum(shares) == len(items) and max(shares) - min(shares) <= 1 and shares == sorted(shares)


def wrong(**changed: object) -> dict:
    return window_case(2, 3, 4, 5, torch.float32) | changed


def wrong_paged(**changed: object) -> dict:
    return paged_case(1, 1, 3, 8, 4, [[5]], 6) | changed


I32 = torch.int32
WRONG = [
    ("mqa_logits", wrong(k_TI=torch.ones(5, 3)), r"q and k must be \[S, J, I\] and \[T, I\], got \[2, 3, 4\]"),
    ("mqa_logits", wrong(k_TI=torch.ones(5, 4).bfloat16()), "share a floating dtype"),
    ("mqa_logits", wrong(weights_SJ=torch.ones(2, 4)), r"weights must be float32 \[2, 3\], got float32 \[2, 4\]"),
    ("mqa_logits", wrong(start_S=torch.zeros(2)), r"start must be int32 \[S\] = \[2\]"),
    ("mqa_logits", wrong(k_scale_T=torch.ones(4)), r"k_scale must be float32 \[T\] = \[5\]"),
    ("mqa_logits", wrong(end_S=torch.full((2,), 5, dtype=I32), width=2), "a window of 5 keys exceeds width 2"),
    ("mqa_logits", wrong(dtype=torch.float16), "dtype must be float32 or bfloat16"),
    ("paged_mqa_logits", wrong_paged(q_BNJI=torch.ones(1, 1, 3, 8)), "q must be float8_e4m3fn"),
    ("paged_mqa_logits", wrong_paged(cache_PYZ=torch.zeros(2, 4, 11, dtype=torch.uint8)), "cache must be uint8"),
    ("paged_mqa_logits", wrong_paged(lengths_BN=torch.tensor([[7]], dtype=I32)), "lengths must lie in 0..6"),
    ("paged_mqa_logits", wrong_paged(pages_BM=torch.tensor([[0, 9]], dtype=I32)), "page 9 is not one of"),
    ("paged_mqa_logits", wrong_paged(width=0), "width must be 1 or more"),
]


@pytest.mark.parametrize(("op", "arguments", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_named(op: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(**arguments)
