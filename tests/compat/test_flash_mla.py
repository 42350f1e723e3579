"""FlashMLA's interface: results against naive float64, adversarial unused memory, schedules, and what it refuses."""

import inspect

import pytest
import torch
from torch import Tensor

from nautile.compat import flash_mla
from nautile.ops.latent_bytes import quantize_latents
from nautile.ops.latent_layout import latent_parts
from nautile.ops.numerics import (
    MLA_DENSE_OUT,
    MLA_LSE,
    MLA_PREFILL_LSE,
    MLA_PREFILL_OUT,
    MLA_SPARSE_DECODE_OUT,
    within,
)

INF = float("inf")


def attend(q_HX: Tensor, kv_TX: Tensor, scale: float, sink_H: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One token: out [H, 512], lse [H], largest logit [H], in float64."""
    if not len(kv_TX):
        H = len(q_HX)
        return torch.zeros(H, 512).double(), torch.full((H,), INF).double(), torch.full((H,), -INF).double()
    scores = q_HX.double() @ kv_TX.double().T * scale
    lse = scores.logsumexp(-1)
    out = (scores - lse[:, None]).exp() @ kv_TX[:, :512].double()
    if sink_H is not None:
        out = out * torch.sigmoid(lse - sink_H.double())[:, None]
    return out, lse, scores.amax(-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("s_q", "h_q", "h_k", "d"), [(1, 16, 1, 576), (3, 6, 2, 512)])
def test_dense_decoding_reads_nothing_beyond_the_lengths(s_q: int, h_q: int, h_k: int, d: int, causal: bool) -> None:
    torch.manual_seed(0)
    lengths = [70, 0, 1, 64]
    q = torch.randn(4, s_q, h_q, d).bfloat16()
    cache = torch.full((7, 64, h_k, d), float("nan")).bfloat16()
    table = torch.full((4, 2), 2147480000, dtype=torch.int32)
    table[0], table[2, 0], table[3, 0] = torch.tensor([4, 1]), 6, 0
    for b, length in enumerate(lengths):
        for t in range(length):
            cache[table[b, t // 64], t % 64] = (torch.randn(h_k, d) / 4).bfloat16()
    meta, nothing = flash_mla.get_mla_metadata("ignored", 1)
    assert nothing is None
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    for _ in range(2):  # the second call takes the schedule of the first
        out, lse = flash_mla.flash_mla_with_kvcache(q, cache, table, seqlens, 512, meta, causal=causal)
    assert out.dtype == torch.bfloat16 and lse.shape == (4, h_q, s_q)
    for b, length in enumerate(lengths):
        rows = cache[table[b, : -(-length // 64)].long()].flatten(0, 1)[:length]
        for s in range(s_q):
            seen = max(0, length - (s_q - 1 - s)) if causal else length
            for g in range(h_k):
                of = slice(g * h_q // h_k, (g + 1) * h_q // h_k)
                want_out, want_lse, _ = attend(q[b, s, of], rows[:seen, g], d**-0.5)
                assert within(out[b, s, of], want_out, MLA_DENSE_OUT) is None
                assert within(lse[b, of, s], want_lse, MLA_LSE) is None


@pytest.mark.parametrize("d", [576, 512])
def test_sparse_decoding_over_fp8_pages(d: int) -> None:
    torch.manual_seed(1)
    pages, place, topk, h_q = 3, 53, 64, 64
    latents = torch.randn(pages, place, d).bfloat16()
    cache = quantize_latents(latents)
    parts = latent_parts(cache)
    scale = parts.scale_NPJ if parts.scale_NPJ.is_floating_point() else (parts.scale_NPJ.float() - 127).exp2()
    tile = parts.fp8_NPF.shape[-1] // scale.shape[-1]
    rows = torch.cat([parts.fp8_NPF.float() * scale.repeat_interleave(tile, -1), parts.rope_NPR.float()], -1)
    rows = rows.bfloat16().flatten(0, 1)
    indices = torch.stack([torch.randperm(pages * place)[:topk] for _ in range(2)]).view(1, 2, topk).int()
    indices[0, 0, 40:] = torch.tensor([-1, -(2**31), 2**31 - 1, pages * place] * 6, dtype=torch.int32)
    indices[0, 1] = -1
    q, sink = torch.randn(1, 2, h_q, d).bfloat16() / 4, torch.randn(h_q)
    sink[0], sink[1] = INF, -INF
    meta, _ = flash_mla.get_mla_metadata()
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, cache[:, :, None], None, None, 512, meta, is_fp8_kvcache=True, indices=indices, attn_sink=sink
    )
    want_out, want_lse, _ = attend(q[0, 0], rows[indices[0, 0, :40].long()], d**-0.5, sink)
    assert within(out[0, 0], want_out, MLA_SPARSE_DECODE_OUT) is None
    assert within(lse[0, :, 0], want_lse, MLA_LSE) is None
    assert not out[0, 1].any() and (lse[0, :, 1] == INF).all()


def test_sparse_prefill() -> None:
    torch.manual_seed(2)
    q, kv = torch.randn(3, 64, 576).bfloat16() / 4, torch.randn(150, 1, 576).bfloat16()
    indices = torch.randint(0, 150, (3, 1, 128), dtype=torch.int32)
    indices[0, 0, 5:] = 150
    indices[2] = -1
    sink, length = torch.randn(64), torch.tensor([128, 70, 128], dtype=torch.int32)
    out, most, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.05, 512, sink, length)
    for s, count in enumerate((5, 70, 0)):
        want = attend(q[s], kv[indices[s, 0, :count].long(), 0], 0.05, sink)
        assert within(out[s], want[0], MLA_PREFILL_OUT) is None
        assert within(lse[s], want[1], MLA_PREFILL_LSE) is None
        assert within(most[s], want[2], MLA_PREFILL_LSE) is None


Q, CACHE = torch.zeros(1, 1, 64, 576).bfloat16(), torch.zeros(2, 64, 1, 576).bfloat16()
TABLE, LENGTHS = torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
BYTES, CHOICE = torch.zeros(2, 64, 1, 656, dtype=torch.uint8), torch.zeros(1, 1, 64, dtype=torch.int32)


def call(*args, meta=None, **kwargs):
    meta = meta or flash_mla.get_mla_metadata()[0]
    given = dict(zip(("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v"), args, strict=False))
    return flash_mla.flash_mla_with_kvcache(**given, tile_scheduler_metadata=meta, **kwargs)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda: call(Q, CACHE, TABLE, LENGTHS, 576), "head_dim_v must be 512"),
        (lambda: call(Q.float(), CACHE, TABLE, LENGTHS, 512), "bfloat16 or float16"),
        (lambda: call(Q, CACHE[:, :32], TABLE, LENGTHS, 512), "a page must hold 64"),
        (lambda: call(Q, CACHE, None, LENGTHS, 512), "needs block_table"),
        (lambda: call(Q, CACHE, TABLE, LENGTHS, 512, attn_sink=torch.zeros(64)), "give indices"),
        (lambda: call(Q, CACHE, TABLE, LENGTHS, 512, is_fp8_kvcache=True), "sparse attention: give indices"),
        (lambda: call(Q, BYTES, None, None, 512, indices=CHOICE), "is_fp8_kvcache must be True"),
        (lambda: call(Q, BYTES, None, None, 512, indices=CHOICE, is_fp8_kvcache=True, causal=True), "causal must be"),
        (
            lambda: call(Q, BYTES, None, None, 512, indices=CHOICE[..., :63], is_fp8_kvcache=True),
            "multiple of 64, got",
        ),
        (lambda: call(Q[:, :, :3], BYTES, None, None, 512, indices=CHOICE, is_fp8_kvcache=True), "64 or 128 heads"),
        (
            lambda: call(Q, BYTES, None, None, 512, indices=CHOICE, is_fp8_kvcache=True, topk_length=LENGTHS),
            "512 dimensions",
        ),
        (lambda: call(Q, CACHE, TABLE, LENGTHS, 512, num_splits=LENGTHS), "num_splits must be None"),
        (lambda: flash_mla.flash_mla_sparse_fwd(Q[0], CACHE[0], CHOICE, 1.0), "multiple of 128"),
    ],
)
def test_wrong_arguments_are_sentences_and_both_kinds_of_error(run, says: str) -> None:
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=says):
            run()


def test_a_schedule_is_for_one_shape() -> None:
    meta, _ = flash_mla.get_mla_metadata()
    call(Q, CACHE, TABLE, LENGTHS, 512, meta=meta)
    with pytest.raises(flash_mla.FlashMLAError, match="made for h_q = 64, got 32"):
        call(Q[:, :, :32], CACHE, TABLE, LENGTHS, 512, meta=meta)
    with pytest.raises(flash_mla.FlashMLAError, match="get_mla_metadata"):
        flash_mla.flash_mla_with_kvcache(Q, CACHE, TABLE, LENGTHS, 512, (None, None))


def test_what_needs_blackwell_says_so() -> None:
    for name in ("flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func"):
        with pytest.raises(NotImplementedError, match="SM100"):
            getattr(flash_mla, name)(Q, Q, Q)


def test_signatures_are_the_official_ones() -> None:
    decode = inspect.signature(flash_mla.flash_mla_with_kvcache).parameters
    assert list(decode) == [
        *("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits"),
        *("softmax_scale", "causal", "is_fp8_kvcache", "indices", "attn_sink", "extra_k_cache"),
        *("extra_indices_in_kvcache", "topk_length", "extra_topk_length"),
    ]
    prefill = inspect.signature(flash_mla.flash_mla_sparse_fwd).parameters
    assert list(prefill) == ["q", "kv", "indices", "sm_scale", "d_v", "attn_sink", "topk_length"]
    assert prefill["d_v"].default == 512
