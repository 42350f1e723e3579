"""Grouped-query attention against transformers' Llama and Qwen2 layers, and against itself over a cache."""

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding

from nautile import ops
from nautile.core.context import ForwardContext
from nautile.infer.cache import KVCache
from nautile.layers.attention.gqa import GroupedQueryAttention
from nautile.layers.rope import Rope

THETA, DIM = 500.0, 48
HEADS = [(6, 2, 10), (4, 4, 10), (3, 1, 14)]


def ours(n_heads: int, n_kv_heads: int, head_dim: int, qkv_bias: bool = False, output_bias: bool = False):
    rope = Rope(head_dim, THETA, None)
    layer = GroupedQueryAttention(0, DIM, n_heads, n_kv_heads, head_dim, rope, qkv_bias, output_bias)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return layer


def hidden(B: int, S: int) -> torch.Tensor:
    return torch.randn(B, S, DIM, generator=torch.Generator().manual_seed(2))


def whole(x_BSD: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> ForwardContext:
    return ForwardContext.for_tokens(torch.zeros(x_BSD.shape[:2], dtype=torch.int64), cu_seqlens)


def oracle(layer: GroupedQueryAttention, x_BSD: torch.Tensor, family: str) -> torch.Tensor:
    """The layer of transformers with our weights."""
    sizes = {
        "hidden_size": DIM,
        "num_attention_heads": layer.n_heads,
        "num_key_value_heads": layer.n_kv_heads,
        "head_dim": layer.head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    }
    if family == "qwen2":
        config = Qwen2Config(**sizes)
        theirs, rotary = Qwen2Attention(config, 0), Qwen2RotaryEmbedding(config)
    else:
        config = LlamaConfig(**sizes, attention_bias=layer.q_proj.bias is not None)
        theirs, rotary = LlamaAttention(config, 0), LlamaRotaryEmbedding(config)
    config._attn_implementation = "eager"
    theirs.load_state_dict(layer.state_dict())
    S = x_BSD.shape[1]
    mask = torch.full((S, S), float("-inf")).triu(1)[None, None]
    return theirs(x_BSD, rotary(x_BSD, torch.arange(S)[None]), mask)[0]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("family", "qkv_bias", "output_bias"), [("llama", False, False), ("qwen2", True, False)])
def test_equals_transformers(heads: tuple, family: str, qkv_bias: bool, output_bias: bool) -> None:
    layer, x_BSD = ours(*heads, qkv_bias, output_bias), hidden(2, 23)
    torch.testing.assert_close(layer(x_BSD, whole(x_BSD)), oracle(layer, x_BSD, family), atol=2e-5, rtol=2e-5)


def test_equals_llama_with_all_four_biases() -> None:
    layer, x_BSD = ours(6, 2, 10, True, True), hidden(2, 5)
    torch.testing.assert_close(layer(x_BSD, whole(x_BSD)), oracle(layer, x_BSD, "llama"), atol=2e-5, rtol=2e-5)


def test_interleaved_rotation_is_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x_BSD = ours(6, 2, 10), hidden(1, 9)
    want = oracle(layer, x_BSD, "llama")
    monkeypatch.setattr(ops, "rotate_half_split", ops.rotate_interleaved, raising=False)
    assert (layer(x_BSD, whole(x_BSD)) - want).abs().max() > 0.01


@pytest.mark.parametrize("heads", HEADS)
def test_steps_over_a_cache_equal_the_whole(heads: tuple) -> None:
    """A first chunk from the start, a second chunk on top of it, then single tokens."""
    layer, x_BSD = ours(*heads, True), hidden(2, 12)
    with torch.no_grad():
        want_BSD = layer(x_BSD, whole(x_BSD))
        cache = KVCache([layer.cache_spec()], 2, torch.float32)
        got = []
        for start, end in [(0, 5), (5, 9), (9, 10), (10, 11), (11, 12)]:
            cache.reserve(end)
            positions_BS = torch.arange(start, end).expand(2, -1)
            ctx = ForwardContext(torch.zeros_like(positions_BS), positions_BS, cache=cache, from_start=start == 0)
            got.append(layer(x_BSD[:, start:end], ctx))
    torch.testing.assert_close(torch.cat(got, 1), want_BSD, atol=2e-5, rtol=2e-5)


def test_rows_at_different_positions() -> None:
    """Sequences of 7 and 4 tokens decode one token together, as each alone."""
    layer, x_BSD, lengths = ours(6, 2, 10), hidden(2, 8), [7, 4]
    with torch.no_grad():
        cache = KVCache([layer.cache_spec()], 2, torch.float32)
        cache.reserve(8)
        for row, length in enumerate(lengths):
            positions_BS = torch.arange(length)[None]
            ctx = ForwardContext(torch.zeros_like(positions_BS), positions_BS, cache=cache.row(row), from_start=True)
            layer(x_BSD[row : row + 1, :length], ctx)
        last_B1D = torch.stack([x_BSD[row, length : length + 1] for row, length in enumerate(lengths)])
        positions_B1 = torch.tensor(lengths)[:, None]
        got = layer(last_B1D, ForwardContext(torch.zeros_like(positions_B1), positions_B1, cache=cache))
        for row, length in enumerate(lengths):
            alone = x_BSD[row : row + 1, : length + 1]
            torch.testing.assert_close(got[row], layer(alone, whole(alone))[0, -1:], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "bias", "size"), [(torch.float16, 1000.0, 4.0), (torch.float16, 100.0, 4.0), (torch.bfloat16, 100.0, 1.0)]
)
@torch.no_grad()
def test_large_key_biases_in_narrow_types(dtype: torch.dtype, bias: float, size: float) -> None:
    """Qwen2's reach hundreds. Scores must not be rounded, or overflow, before they are scaled."""
    layer, x_BSD = ours(4, 2, 64, True).to(dtype), (size * hidden(2, 150)).to(dtype)
    layer.k_proj.bias.copy_(bias * torch.randn(128, generator=torch.Generator().manual_seed(3)))
    config = Qwen2Config(hidden_size=DIM, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    config._attn_implementation = "sdpa"
    theirs = Qwen2Attention(config, 0).to(dtype)
    theirs.load_state_dict(layer.state_dict())
    rotary = Qwen2RotaryEmbedding(config)(x_BSD, torch.arange(150)[None])
    cache, pieces = KVCache([layer.cache_spec()], 2, dtype), []
    for start, end in [(0, 5), (5, 90), (90, 149), (149, 150)]:
        cache.reserve(end)
        positions_BS = torch.arange(start, end).expand(2, -1)
        ctx = ForwardContext(torch.zeros_like(positions_BS), positions_BS, cache=cache, from_start=start == 0)
        pieces.append(layer(x_BSD[:, start:end], ctx))
    outputs = {"sdpa": theirs(x_BSD, rotary, None)[0], "chunks": torch.cat(pieces, 1)}
    outputs["whole"] = layer(x_BSD, whole(x_BSD))
    with ops.use("reference"):
        outputs["reference"] = layer(x_BSD, whole(x_BSD))
    exact = layer.float()(x_BSD.float(), whole(x_BSD))
    off = {name: ((y.float() - exact).norm() / exact.norm()).item() for name, y in outputs.items()}
    assert all(value <= 1.2 * off["sdpa"] for value in off.values()), off


def test_documents_do_not_see_each_other() -> None:
    layer, x_BSD = ours(6, 2, 10), hidden(1, 9)
    apart = layer(x_BSD, whole(x_BSD, torch.tensor([0, 4, 9])))
    # Attention depends on distances only, so a document alone may start at position 0.
    alone = torch.cat([layer(x_BSD[:, part], whole(x_BSD[:, part])) for part in (slice(0, 4), slice(4, 9))], 1)
    torch.testing.assert_close(apart, alone, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(apart, layer(x_BSD, whole(x_BSD)), atol=1e-3)


def test_the_cache_holds_the_key_heads_only() -> None:
    assert ours(6, 2, 10).cache_spec().paged == {"k": (2, 10), "v": (2, 10)}
