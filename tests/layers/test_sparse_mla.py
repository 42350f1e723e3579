"""Sparse latent attention: masked, gathered, chunked, ragged and packed, all the same numbers."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.core.context import ForwardContext
from nautile.infer.cache import KVCache
from nautile.layers.attention.indexer import Indexer
from nautile.layers.attention.mla import MLA
from nautile.layers.attention.sparse_mla import SparseMLA, causal
from nautile.layers.rope import Rope
from nautile.layers.rope_scaling import YarnScaling

DIM, TOPK, LENGTH = 21, 7, 40
SHAPE = {"q_lora_rank": 14, "kv_lora_rank": 10, "nope_dim": 5, "rope_dim": 6, "v_dim": 9}


def make(dtype: torch.dtype = torch.float64, topk: int = TOPK) -> SparseMLA:
    rope = Rope(6, 10000.0, YarnScaling(original_max_position_embeddings=16))
    indexer = Indexer(DIM, 14, 16, 8, rope_dim=6, topk=topk)
    attention = SparseMLA(0, DIM, 3, **SHAPE, rope=rope, indexer=indexer).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)
    return attention


def hidden(B: int = 2, S: int = LENGTH, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, S, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def whole(B: int, S: int) -> ForwardContext:
    return ForwardContext.for_tokens(torch.zeros(B, S, dtype=torch.int64))


def cached(cache: KVCache, starts: list[int], S: int, from_start: bool = False) -> ForwardContext:
    positions = torch.tensor(starts)[:, None] + torch.arange(S)
    return ForwardContext(torch.zeros_like(positions), positions, cache=cache, from_start=from_start)


def new_cache(attention: MLA, B: int) -> KVCache:
    return KVCache([attention.cache_spec()], B, attention.o_proj.weight.dtype)


def in_chunks(attention: MLA, x: Tensor, sizes: list[int]) -> Tensor:
    """The sequence read piece by piece over a cache."""
    cache, outputs, start = new_cache(attention, x.shape[0]), [], 0
    while start < x.shape[1]:
        size = sizes[min(len(outputs), len(sizes) - 1)]
        chunk = x[:, start : start + size]
        cache.reserve(start + chunk.shape[1])
        ctx = cached(cache, [start] * x.shape[0], chunk.shape[1], from_start=start == 0)
        outputs.append(attention(chunk, ctx))
        start += size
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [[1], [40], [11], [5, 3], [20, 1], [3, 30, 7]], ids=str)
@torch.no_grad()
def test_chunks_and_single_tokens_give_what_the_whole_prompt_gives(sizes: list[int], dtype: torch.dtype) -> None:
    attention, x = make(dtype), hidden(dtype=dtype)
    expected = attention(x, whole(2, LENGTH))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(in_chunks(attention, x, sizes), expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_it_is_dense_exactly_as_long_as_everything_is_selected() -> None:
    sparse = make()
    dense = MLA(0, DIM, 3, **SHAPE, rope=sparse.rope).double()
    dense.load_state_dict({name: t for name, t in sparse.state_dict().items() if "indexer" not in name})
    x = hidden()
    difference = (sparse(x, whole(2, LENGTH)) - dense(x, whole(2, LENGTH))).abs().amax((0, 2))
    assert (difference[:TOPK] < 1e-12).all() and (difference[TOPK:] > 1e-3).all()
    short, ctx = x[:, :TOPK], whole(2, TOPK)
    assert torch.equal(sparse(short, ctx), dense(short, ctx))
    everything = make(topk=LENGTH)
    torch.testing.assert_close(everything(x, whole(2, LENGTH)), dense(x, whole(2, LENGTH)), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(in_chunks(everything, x, [9]), dense(x, whole(2, LENGTH)), atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_no_scores_while_everything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("scores were computed")

    monkeypatch.setattr(ops, "index_scores", refuse)
    attention = make()
    in_chunks(attention, hidden(S=TOPK), [4, 1])
    attention(hidden(S=TOPK), whole(2, TOPK))
    with pytest.raises(AssertionError, match="scores were computed"):
        in_chunks(attention, hidden(S=TOPK + 1), [TOPK, 1])


@torch.no_grad()
def test_a_ragged_batch_equals_each_sequence_alone() -> None:
    """Lengths below, at and above the limit; what stands behind a sequence's end is never selected, NaN included."""
    attention, lengths, steps = make(), [3, TOPK, 29], 6
    x = hidden(B=3)
    cache = new_cache(attention, 3)
    cache.reserve(max(lengths) + steps)
    for entry in cache.layers[0].values():
        entry.fill_(float("nan"))
    for row, length in enumerate(lengths):
        ctx = cached(cache.row(row), [0], length, from_start=True)
        attention(x[row : row + 1, :length], ctx)
    for step in range(steps):
        new = torch.stack([x[row, length + step] for row, length in enumerate(lengths)])[:, None]
        together = attention(new, cached(cache, [length + step for length in lengths], 1))
        for row, length in enumerate(lengths):
            end = length + step + 1
            alone = attention(x[row : row + 1, :end], whole(1, end))[:, -1:]
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_packed_documents_select_and_read_only_themselves() -> None:
    attention, x = make(), hidden()
    cuts = torch.tensor([0, 12, 15, 40, 61, 80])
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    packed = attention(x, ForwardContext.for_tokens(tokens, cuts)).flatten(0, 1)
    flat = x.flatten(0, 1)
    for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        positions = torch.arange(start, end)[None] % LENGTH  # rotation runs on through the row
        alone = attention(flat[None, start:end], ForwardContext(torch.zeros_like(positions), positions))[0]
        # Angles are float32 and differ in their last bit between positions.
        torch.testing.assert_close(packed[start:end], alone, atol=1e-6, rtol=1e-6)


def test_gathered_and_masked_forms_have_the_same_gradients() -> None:
    attention, ctx = make(), whole(2, LENGTH)
    x = hidden().requires_grad_()
    angles = attention.rope.cos_sin(ctx.positions_BS)
    projected = attention.project(x, ctx)
    selection = (x, attention.query_source(x), attention.indexer.keys(x, angles), angles, causal(ctx))
    mask = attention.indexer.mask(*selection)
    masked = ops.selected_attention(*attention.expand(*projected), mask, attention.scale)
    gathered = attention.attend_gathered(*projected, attention.indexer.rows(*selection))
    torch.testing.assert_close(masked, gathered, atol=1e-12, rtol=1e-12)
    weights = [p for name, p in attention.named_parameters() if not name.startswith(("indexer", "o_proj"))]
    both = [torch.autograd.grad(o.sin().sum(), [x, *weights], retain_graph=True) for o in (masked, gathered)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_the_language_models_loss_does_not_train_the_indexer() -> None:
    attention = make()
    attention(hidden(), whole(2, LENGTH)).sin().sum().backward()
    for name, parameter in attention.named_parameters():
        assert (parameter.grad is None) == name.startswith("indexer."), name


def test_the_cache_holds_a_latent_a_rotated_key_and_an_index_key() -> None:
    assert make().cache_spec().paged == {"c_kv": (10,), "k_rope": (6,), "k_index": (8,)}


@torch.no_grad()
def test_backends_agree() -> None:
    attention, x = make(), hidden()
    expected = in_chunks(attention, x, [20, 1])
    with ops.use("reference"):
        torch.testing.assert_close(in_chunks(attention, x, [20, 1]), expected, atol=1e-12, rtol=1e-12)
