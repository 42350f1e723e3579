"""DeepGEMM's interface: its signatures, results against float64, its layouts, and what it refuses."""

import inspect

import pytest
import torch
from torch import Tensor

import nautile.compat.deep_gemm as deep_gemm
from nautile.compat.deep_gemm.utils import (
    align,
    cast_back_from_fp4,
    ceil_div,
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_custom_dims_cast_to_fp8,
    per_token_cast_to_fp4,
    per_token_cast_to_fp8,
    transpose_packed_fp4,
    unpack_ue8m0_from_int,
)
from nautile.ops.numerics import FP8_DIFF, SAME_FP8_DIFF, calc_diff

BF16, FP32 = torch.bfloat16, torch.float32


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


def by_group(b: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [per_block_cast_to_fp8(x, use_ue8m0=False) for x in b]
    return torch.stack([x for x, _ in pairs]), torch.stack([scale for _, scale in pairs])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 128), (70, 264, 384), (33, 129, 200)])
def test_fp8_gemm_in_all_four_layouts(m: int, n: int, k: int) -> None:
    a, b = randn(m, k), randn(n, k)
    want = a.double() @ b.double().T
    left, right = per_token_cast_to_fp8(a, use_ue8m0=False), per_block_cast_to_fp8(b, use_ue8m0=False)
    turned = [(x[0].T, x[1].T) for x in (left, right)]
    calls = {
        "nt": (left, right),
        "nn": (left, turned[1]),
        "tn": (turned[0], turned[1]),
        "tt": (turned[0], right),
    }
    for name, pair in calls.items():
        d = torch.full((m, n), float("nan"), dtype=BF16)
        getattr(deep_gemm, f"fp8_gemm_{name}")(*pair, d)
        assert calc_diff(d, want) < FP8_DIFF, name


def test_fp8_gemm_adds_to_a_float32_result_with_scales_per_row() -> None:
    a, b = randn(40, 256), randn(24, 256)
    c = torch.randn(40, 24) * 32
    want, d = c.double() + a.double() @ b.double().T, c.clone()
    pairs = [per_token_cast_to_fp8(x, use_ue8m0=False) for x in (a, b)]
    deep_gemm.fp8_gemm_nt(*pairs, d, c=d, recipe=(1, 1, 128))
    assert calc_diff(d, want) < FP8_DIFF
    other = torch.empty_like(d)
    deep_gemm.fp8_gemm_nt(*pairs, other, c=c, recipe_a=(1, 128), recipe_b=(1, 128))
    assert torch.equal(other, d)


def test_empty_products_copy_or_clear() -> None:
    none = torch.empty(3, 0).to(torch.float8_e4m3fn), torch.empty(3, 0)
    d, c = torch.ones(3, 3), torch.randn(3, 3)
    deep_gemm.fp8_gemm_nt(none, none, d, recipe=(1, 1, 128))
    assert not d.any()
    deep_gemm.fp8_gemm_nt(none, none, d, c=c, recipe=(1, 1, 128))
    assert torch.equal(d, c)


@pytest.mark.parametrize("psum", [False, True])
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_contiguous_groups_with_padding_and_an_empty_one(kind: str, psum: bool) -> None:
    counts, n, k = [100, 0, 128, 5], 72, 256
    starts = [0, 128, 128, 256]
    m = 384
    a, b = randn(m, k), randn(4, n, k)
    rows = torch.full((m,), -1, dtype=torch.int32)
    want = torch.zeros(m, n, dtype=torch.float64)
    for g, (start, count) in enumerate(zip(starts, counts, strict=True)):
        rows[start : start + count] = g
        want[start : start + count] = a[start : start + count].double() @ b[g].double().T
    layout = torch.tensor([s + c for s, c in zip(starts, counts, strict=True)], dtype=torch.int32) if psum else rows
    a[rows < 0] = 1e9  # padding may hold anything
    d = torch.full((m, n), float("nan"), dtype=BF16)
    if kind == "fp8":
        left = per_token_cast_to_fp8(a, use_ue8m0=False)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(left, by_group(b), d, layout, use_psum_layout=psum)
    else:
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(a, b, d, layout, use_psum_layout=psum)
    assert calc_diff(d, want) < (FP8_DIFF if kind == "fp8" else 1e-5)
    assert not d[rows < 0].any()


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_masked_groups_write_no_more_than_asked(kind: str) -> None:
    a, b = randn(3, 40, 128), randn(3, 24, 128)
    masked = torch.tensor([40, 0, 7], dtype=torch.int32)
    d = torch.full((3, 40, 24), 7.0, dtype=BF16)
    if kind == "fp8":
        pairs = [per_token_cast_to_fp8(x, use_ue8m0=False) for x in a]
        left = torch.stack([x for x, _ in pairs]), torch.stack([scale for _, scale in pairs])
        deep_gemm.fp8_m_grouped_gemm_nt_masked(left, by_group(b), d, masked, expected_m=16)
    else:
        deep_gemm.bf16_m_grouped_gemm_nt_masked(a, b, d, masked, 16)
    for g, count in enumerate(masked.tolist()):
        assert (d[g, count:] == 7).all()
        if count:
            assert calc_diff(d[g, :count], a[g, :count].double() @ b[g].double().T) < FP8_DIFF


def test_k_groups_add_up_gradients() -> None:
    ks, m, n = [128, 0, 256], 40, 24
    a, b = randn(sum(ks), m), randn(sum(ks), n)
    c = torch.randn(3, m, n)
    parts = list(zip(a.split(ks), b.split(ks), strict=True))
    want = torch.stack([x + y.double().T @ z.double() for x, (y, z) in zip(c.double(), parts, strict=True)])
    layout = torch.tensor(ks, dtype=torch.int32)
    d = torch.full_like(c, float("nan"))
    deep_gemm.k_grouped_bf16_gemm_tn_contiguous(a, b, d, ks, layout, c)
    assert calc_diff(d, want) < 1e-5

    def flat(x: Tensor) -> tuple[Tensor, Tensor]:
        data, scale = per_channel_cast_to_fp8(x, use_ue8m0=False)
        return torch.cat([part.T.flatten() for part in data.split(ks)]), scale.T

    d = c.clone()
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(flat(a), flat(b), d, ks, layout, d)
    assert calc_diff(d, want) < FP8_DIFF


def test_skip_head_mid_leaves_gaps() -> None:
    m, heads, (left, gap, right) = 20, 2, (32, 16, 32)
    a, b = randn(m, 128), randn(heads * (left + right), 128)
    pairs = per_token_cast_to_fp8(a, use_ue8m0=False), per_block_cast_to_fp8(b, use_ue8m0=False)
    plain = torch.empty(m, heads * (left + right), dtype=BF16)
    deep_gemm.fp8_gemm_nt(*pairs, plain)
    d = torch.full((m, heads * (left + gap + right)), 3.0, dtype=BF16)
    deep_gemm.fp8_gemm_nt_skip_head_mid(*pairs, d, (left, gap, right))
    got = d.view(m, heads, -1)
    assert (got[:, :, left : left + gap] == 3).all()
    assert torch.equal(torch.cat([got[..., :left], got[..., left + gap :]], -1).flatten(1), plain)


def test_einsums_and_prenorm() -> None:
    x, y = randn(5, 3, 16), randn(3, 8, 16)
    z = torch.empty(5, 3, 8, dtype=BF16)
    deep_gemm.einsum("bhr,hdr->bhd", x, y, z)
    assert calc_diff(z, torch.einsum("bhr,hdr->bhd", x.double(), y.double())) < 1e-5
    back = torch.empty(5, 3, 16, dtype=BF16)
    deep_gemm.einsum("bhd,hdr->bhr", z, y, back)
    assert calc_diff(back, torch.einsum("bhd,hdr->bhr", z.double(), y.double())) < 1e-5
    a, b, d = randn(7, 6, 10), randn(7, 4, 10), torch.randn(6, 4)
    want = d.double() + torch.einsum("bmk,bnk->mn", a.double(), b.double())
    deep_gemm.einsum("bmk,bnk->mn", a, b, d, c=d)
    assert calc_diff(d, want) < 1e-5
    for splits in (None, 3):
        lead = () if splits is None else (splits,)
        weights, out, squares = torch.randn(4, 50), torch.empty(*lead, 6, 4), torch.empty(*lead, 6)
        rows = randn(6, 50)
        deep_gemm.tf32_hc_prenorm_gemm(rows, weights, out, squares, splits)
        total = (out, squares) if splits is None else (out.sum(0), squares.sum(0))
        assert calc_diff(total[0], rows.double() @ weights.double().T) < 1e-8
        assert calc_diff(total[1], rows.double().square().sum(-1)) < 1e-8


def test_mqa_logits_contiguous_and_paged_agree() -> None:
    (batch, new, heads, width, length), most = (2, 2, 32, 32, 100), 130
    q = torch.randn(batch, new, heads, width).to(torch.float8_e4m3fn)
    kv, scale = per_custom_dims_cast_to_fp8(torch.randn(batch * 128, width), (0,), use_ue8m0=True)
    weights = torch.randn(batch * new, heads)
    lens = torch.tensor([[length - 1, length], [2, 3]], dtype=torch.int32)
    cache = torch.empty(4, 64, 1, width + 4, dtype=torch.uint8)
    flat = cache.view(4, -1)
    flat[:, : 64 * width] = kv.view(torch.uint8).view(4, -1)
    flat[:, 64 * width :] = scale.view(4, 64).view(torch.uint8)
    table = torch.tensor([[0, 1], [2, 2147480000]], dtype=torch.int32)
    meta = deep_gemm.get_paged_mqa_logits_metadata(lens, 64, deep_gemm.get_num_sms())
    assert meta.shape == (deep_gemm.get_num_sms() + 1, 2) and meta.dtype == torch.int32
    paged = deep_gemm.fp8_paged_mqa_logits(q, cache, weights, lens, table, meta, most)
    for b in range(batch):
        keys = slice(128 * b, 128 * (b + 1))
        start = torch.zeros(new, dtype=torch.int32)
        part = deep_gemm.fp8_mqa_logits(
            q[b], (kv[keys], scale[keys]), weights[b * new : (b + 1) * new], start, lens[b].contiguous()
        )
        for s in range(new):
            seen = int(lens[b, s])
            assert calc_diff(paged[b * new + s, :seen], part[s, :seen]) < SAME_FP8_DIFF
            assert (part[s, seen:] == float("-inf")).all()


@pytest.mark.parametrize("ue8m0", [False, True])
def test_casts_to_fp8(ue8m0: bool) -> None:
    x = randn(130, 200)
    for cast, rows, columns in ((per_token_cast_to_fp8, 1, 128), (per_block_cast_to_fp8, 128, 128)):
        data, scale = cast(x, ue8m0)
        assert scale.shape == (ceil_div(130, rows), ceil_div(200, columns))
        wide = scale.repeat_interleave(rows, 0)[:130].repeat_interleave(columns, 1)[:, :200]
        assert calc_diff(data.float() * wide, x) < FP8_DIFF
        assert not ue8m0 or (scale.view(torch.int32) & 0x7FFFFF == 0).all()
    data, scale = per_token_cast_to_fp8(randn(4, 512), True, use_packed_ue8m0=True)
    assert scale.dtype == torch.int32 and torch.equal(
        unpack_ue8m0_from_int(scale), unpack_ue8m0_from_int(scale).log2().exp2()
    )


def test_fp4_pairs_round_to_the_nearest_and_turn() -> None:
    x = randn(6, 64)
    pairs, scale = per_token_cast_to_fp4(x, use_ue8m0=False, gran_k=32)
    back = cast_back_from_fp4(pairs, scale, gran_k=32)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = x.float() / scale.repeat_interleave(32, 1)
    best = grid[(scaled.abs()[..., None] - grid).abs().argmin(-1)] * scaled.sign()
    assert torch.equal(back / scale.repeat_interleave(32, 1), best + 0.0)
    turned = transpose_packed_fp4(pairs)
    assert torch.equal(cast_back_from_fp4(turned, torch.ones(64, 1)), cast_back_from_fp4(pairs, torch.ones(6, 1)).T)


def test_scales_lie_as_a_tma_reads_them() -> None:
    sf = torch.rand(2, 5, 7)
    for x in (sf, sf.transpose(1, 2).contiguous().transpose(1, 2)):
        laid = deep_gemm.get_mn_major_tma_aligned_tensor(x)
        assert torch.equal(laid, sf) and laid.stride() == (8 * 7, 1, 8)
    assert deep_gemm.transform_sf_into_required_layout(sf, 5, 7 * 128, (1, 128, 128), 2, True).stride()[1] == 1
    blocks = torch.rand(2, 7)
    assert deep_gemm.transform_sf_into_required_layout(blocks, 256, 896, (128, 128)) is blocks


def test_settings_are_kept_and_bounded() -> None:
    before = deep_gemm.get_num_sms()
    try:
        deep_gemm.set_num_sms(8)
        assert deep_gemm.get_num_sms() == 8
        with pytest.raises(RuntimeError, match="num_sms"):
            deep_gemm.set_num_sms(10**6)
        deep_gemm.set_mk_alignment_for_contiguous_layout(64)
        assert deep_gemm.get_m_alignment_for_contiguous_layout() == 64
    finally:
        deep_gemm.set_num_sms(before)
        deep_gemm.set_mk_alignment_for_contiguous_layout(128)
    assert deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout(17) == 128
    assert align(129, 128) == 256


FP8 = torch.zeros(8, 128).to(torch.float8_e4m3fn)
ONE = torch.ones(8, 1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: deep_gemm.fp8_gemm_nt((FP8.float(), ONE), (FP8, ONE), torch.empty(8, 8)), "a must be .*float8"),
        (lambda: deep_gemm.fp8_gemm_nt((FP8, ONE), (FP8, ONE), torch.empty(8, 8)), r"scales of b .*must be \[1, 1\]"),
        (
            lambda: deep_gemm.fp8_gemm_nt((FP8, ONE), (FP8, ONE[:1]), torch.empty(8, 9, dtype=BF16)),
            r"d must be \[8, 8\], got \[8, 9\]",
        ),
        (
            lambda: deep_gemm.fp8_gemm_nt((FP8, ONE), (FP8, ONE[:1]), torch.empty(8, 8)),
            "d must be bfloat16 with a recipe of 128",
        ),
        (
            lambda: deep_gemm.fp8_gemm_nt((FP8, ONE), (FP8, ONE), torch.empty(8, 8), recipe=(1, 1, 128)),
            "adds to a float32 c",
        ),
        (
            lambda: deep_gemm.fp8_gemm_nt((FP8.T.contiguous().T, ONE), (FP8, ONE[:1]), torch.empty(8, 8, dtype=BF16)),
            "a must be K-major",
        ),
        (
            lambda: deep_gemm.m_grouped_fp8_gemm_nt_masked(
                (FP8[None], ONE[None]), (FP8[None], ONE[None, :1]), torch.empty(1, 8, 8, dtype=BF16), ONE[0].int(), 0
            ),
            "expected_m must be positive",
        ),
        (lambda: deep_gemm.einsum("ab,bc->ac", FP8, FP8, FP8), "expr must be one of"),
    ],
)
def test_wrong_operands_are_sentences_and_both_kinds_of_error(call, says: str) -> None:
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=says):
            call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: deep_gemm.fp8_gemm_nt((FP8.view(torch.int8), ONE), (FP8, ONE[:1]), torch.empty(8, 8, dtype=BF16)),
        lambda: deep_gemm.fp8_gemm_nt((FP8, ONE.int()), (FP8, ONE[:1]), torch.empty(8, 8, dtype=BF16)),
        lambda: deep_gemm.k_grouped_fp8_gemm_tn_contiguous((FP8, ONE), (FP8, ONE), FP8, [8], ONE),
        lambda: deep_gemm.fp8_fp4_mega_moe(),
        lambda: deep_gemm.fp8_einsum("bhd,hdr->bhr", (FP8, ONE), (FP8, ONE), FP8),
    ],
)
def test_what_needs_blackwell_says_so(call) -> None:
    with pytest.raises(NotImplementedError, match="SM100"):
        call()


def test_signatures_are_the_official_ones() -> None:
    """Names, order and defaults of today's DeepGEMM (2.6.1), as its callers pass them by position and by name."""
    gemm = ["a", "b", "d", "c", "recipe", "recipe_a", "recipe_b", "compiled_dims", "disable_ue8m0_cast"]
    official = {
        "fp8_gemm_nt": gemm,
        "fp8_gemm_tn": gemm,
        "bf16_gemm_nt": ["a", "b", "d", "c", "compiled_dims"],
        "m_grouped_fp8_gemm_nt_contiguous": [
            *("a", "b", "d", "grouped_layout", "recipe", "recipe_a", "recipe_b", "compiled_dims", "disable_ue8m0_cast"),
            *("use_psum_layout", "ensure_zero_padding", "expected_m_for_psum_layout"),
        ],
        "m_grouped_fp8_gemm_nt_masked": [
            *("a", "b", "d", "masked_m", "expected_m", "recipe", "recipe_a", "recipe_b", "compiled_dims"),
            "disable_ue8m0_cast",
        ],
        "k_grouped_fp8_gemm_nt_contiguous": [
            *("a", "b", "d", "ks_cpu", "grouped_layout", "c", "recipe", "compiled_dims", "use_psum_layout"),
        ],
        "fp8_mqa_logits": [
            *("q", "kv", "weights", "cu_seq_len_k_start", "cu_seq_len_k_end", "clean_logits", "max_seqlen_k"),
        ],
        "fp8_paged_mqa_logits": [
            *("q", "kv_cache", "weights", "context_lens", "block_table", "schedule_meta", "max_context_len"),
            *("clean_logits", "indices"),
        ],
        "get_paged_mqa_logits_metadata": ["context_lens", "block_kv", "num_sms", "indices"],
        "einsum": ["expr", "a", "b", "d", "c", "use_cublaslt"],
        "tf32_hc_prenorm_gemm": ["a", "b", "d", "sqr_sum", "num_splits"],
        "fp8_gemm_nt_skip_head_mid": ["a", "b", "d", "head_splits", "recipe", "compiled_dims", "disable_ue8m0_cast"],
    }
    for name, arguments in official.items():
        assert list(inspect.signature(getattr(deep_gemm, name)).parameters) == arguments, name
    defaults = inspect.signature(deep_gemm.fp8_gemm_nt).parameters
    assert defaults["compiled_dims"].default == "nk"
    assert inspect.signature(deep_gemm.fp8_gemm_tt).parameters["compiled_dims"].default == "mn"
