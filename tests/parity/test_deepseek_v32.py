"""DeepSeek-V3.2 against transformers on tiny random weights, with more tokens than a query reads.

Prompts are chosen so that no selection is decided by rounding: the k-th and the (k+1)-th score of every query in every
layer are at least `GAP` apart (checked). Each detail of the indexer that is easily got wrong is got wrong once.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import DEEPSEEK_V3, YARN, build, published_spelling
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV32ForCausalLM as Oracle

import nautile
from nautile import ops
from nautile.checkpoint.fp8 import SCALE, Fp8Format, dequantize, is_quantized, quantize
from nautile.core.context import ForwardContext
from nautile.core.errors import UserError
from nautile.layers.attention import indexer as indexer_module
from nautile.layers.attention.indexer import Indexer
from nautile.layers.rope import Rope
from nautile.models.causal_lm import CausalLM
from nautile.models.deepseek_v32.checkpoint import layout
from nautile.models.deepseek_v32.config import V32_MICRO, DeepseekV32Config
from nautile.models.deepseek_v32.model import DeepseekV32ForCausalLM

TOPK = 11
GAP = 2e-4
SHAPE = {**DEEPSEEK_V3, "index_n_heads": 18, "index_head_dim": 20, "index_topk": TOPK}
VARIANTS = {
    "v32": {},
    "mscale unlike mscale_all_dim": {"rope_parameters": {**YARN, "mscale": 0.707}},
    "plain rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "whole head rotated": {"index_head_dim": 12},
}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, CausalLM]:
    oracle = build("DeepseekV32", SHAPE)
    oracle.save_pretrained(tmp_path / "hf")
    return oracle, nautile.load(tmp_path / "hf")


def some_tokens(batch: int = 3, length: int = 37, seed: int = 149) -> Tensor:
    return torch.randint(0, 259, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def gaps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Smallest distance between a chosen and a refused score, of every selection from here on."""
    seen_gaps: list[float] = []

    def watched(scores: Tensor, seen: Tensor, k: int) -> Tensor:
        ordered = scores.masked_fill(~seen, -torch.inf).sort(-1, descending=True).values
        cut = ordered[..., k - 1] - ordered[..., k]
        seen_gaps.extend(cut[cut.isfinite()].tolist())
        return choose(scores, seen, k)

    choose = ops.top_rows
    monkeypatch.setattr(ops, "top_rows", watched)
    return seen_gaps


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits(variant: str, tmp_path: Path, gaps: list[float]) -> None:
    oracle, tokens = build("DeepseekV32", {**SHAPE, **VARIANTS[variant]}), some_tokens()
    oracle.save_pretrained(tmp_path)
    ours = nautile.load(tmp_path)
    with torch.no_grad():
        expected = oracle(tokens).logits
        assert expected.std() > 0.5, "the oracle must say something"
        torch.testing.assert_close(ours(tokens), expected, atol=2e-4, rtol=2e-4)
    assert len(gaps) == 4 * 3 * (37 - TOPK) and min(gaps) > GAP


def test_gradients(pair: tuple[Any, CausalLM], gaps: list[float]) -> None:
    oracle, ours = pair
    tokens, weights = some_tokens(2, 25), torch.randn(2, 25, 259, generator=torch.Generator().manual_seed(3))
    (oracle(tokens).logits * weights).sum().backward()
    (ours(tokens) * weights).sum().backward()
    published = dict(oracle.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = published.pop(name).grad
        if ".indexer." in name:
            assert parameter.grad is None and expected is None, "the language model's loss does not train the indexer"
            continue
        error = (parameter.grad - expected).norm() / expected.norm()
        assert error < 1e-3, f"{name}: gradient off by {error:.1e} of its norm"
    assert not published
    assert min(gaps) > GAP


def test_greedy_decode_with_cache(pair: tuple[Any, CausalLM], gaps: list[float]) -> None:
    """Prompts below, around and above the limit decode together as each alone does."""
    oracle, ours = pair
    prompts = [some_tokens(1, length) for length in (1, 9, 30)]
    params = nautile.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    llm = nautile.LLM(ours)
    outputs = llm.generate([prompt[0].tolist() for prompt in prompts], params)
    assert min(gaps) > GAP
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = oracle.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert output.token_ids == expected[0, prompt.shape[1] :].tolist()
        assert llm.generate([prompt[0].tolist()], params)[0].token_ids == output.token_ids


def test_a_prompt_read_in_chunks(pair: tuple[Any, CausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Later chunks attend in gathered form; the tokens that follow are the same."""
    oracle, ours = pair
    from nautile.infer import batch

    monkeypatch.setattr(batch, "PREFILL_CHUNK", 7)
    prompt = some_tokens(1, 30)
    params = nautile.SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    expected = oracle.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)
    output = nautile.LLM(ours).generate([prompt[0].tolist()], params)[0]
    assert output.token_ids == expected[0, 30:].tolist()


def interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "rotate_half_split", ops.rotate_interleaved)


def rms_norm_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def rms(x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, shape, weight, eps) + bias

    monkeypatch.setattr(indexer_module.F, "layer_norm", rms)


def keys_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.layer_norm
    monkeypatch.setattr(indexer_module.F, "layer_norm", lambda x, shape, weight, bias, eps: right(x, shape, weight))


def rotated_dimensions_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(self: Indexer, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        rest, turned = x.split([self.head_dim - self.rope_dim, self.rope_dim], dim=-1)
        return torch.cat([rest, ops.rotate_half_split(turned, *angles)], dim=-1)

    monkeypatch.setattr(Indexer, "place", place)


def plain_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The indexer without YaRN."""
    right, rope = Indexer.place, Rope(12, 10000.0)

    def place(self: Indexer, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        return right(self, x, rope.cos_sin(torch.arange(x.shape[1]).expand(x.shape[:2])))

    monkeypatch.setattr(Indexer, "place", place)


def without_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ops, "index_scores", lambda q, k, w: torch.einsum("bsj,bsjt->bst", w, torch.einsum("bsji,bti->bsjt", q, k))
    )


def weights_without_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Indexer.weights
    monkeypatch.setattr(Indexer, "weights", lambda self, x: right(self, x).abs())


def weights_negated(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Indexer.weights
    monkeypatch.setattr(Indexer, "weights", lambda self, x: -right(self, x))


def heads_not_weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Indexer.weights
    monkeypatch.setattr(Indexer, "weights", lambda self, x: torch.ones_like(right(self, x)))


def one_row_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.top_rows
    monkeypatch.setattr(ops, "top_rows", lambda scores, seen, k: right(scores, seen, k - 1))


MISTAKES: list[Callable[[pytest.MonkeyPatch], None]] = [
    interleaved,
    rms_norm_of_keys,
    keys_without_bias,
    rotated_dimensions_last,
    plain_frequencies,
    without_relu,
    weights_without_sign,
    weights_negated,
    heads_not_weighted,
    one_row_fewer,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_each_mistake_in_the_indexer_shows_beyond_topk_and_only_there(
    mistake: Callable[[pytest.MonkeyPatch], None], pair: tuple[Any, CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them was DeepSeek's own: V3.2-Exp's code rotated pairs until November 2025."""
    oracle, ours = pair
    tokens = some_tokens()
    with torch.no_grad():
        expected, expected_short = oracle(tokens).logits, oracle(tokens[:, :TOPK]).logits
        mistake(monkeypatch)
        assert (ours(tokens) - expected).abs().max() > 0.1
        torch.testing.assert_close(ours(tokens[:, :TOPK]), expected_short, atol=2e-4, rtol=2e-4)


def test_transformers_reads_what_we_save(pair: tuple[Any, CausalLM], tmp_path: Path) -> None:
    oracle, ours = pair
    nautile.save(ours, tmp_path / "ours")
    written, original = load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)
    again = Oracle.from_pretrained(tmp_path / "ours", attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(some_tokens()).logits, oracle(some_tokens()).logits, atol=1e-5, rtol=1e-5)
    reloaded = nautile.load(tmp_path / "ours")
    assert reloaded.config == ours.config
    assert all(torch.equal(t, reloaded.state_dict()[name]) for name, t in ours.state_dict().items())


def test_both_config_spellings(pair: tuple[Any, CausalLM], tmp_path: Path) -> None:
    _, ours = pair
    new_spelling = json.loads((tmp_path / "hf/config.json").read_text())
    assert "rope_parameters" in new_spelling and "mlp_layer_types" in new_spelling
    assert DeepseekV32Config.from_hf(new_spelling) == ours.config
    old_spelling = published_spelling(dict(new_spelling))
    del old_spelling["mlp_layer_types"], old_spelling["layer_types"]
    assert DeepseekV32Config.from_hf(old_spelling) == ours.config
    written = ours.config.to_hf()
    assert DeepseekV32Config.from_hf(written) == ours.config
    assert written["index_topk"] == TOPK and "index_fp8" not in written
    rounded = replace(ours.config, index_head_dim=16, index_fp8=True)
    assert DeepseekV32Config.from_hf(rounded.to_hf()) == rounded


def test_dense_layers_are_counted_from_the_list_of_layer_types() -> None:
    published = {**V32_MICRO.to_hf(), "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}
    assert DeepseekV32Config.from_hf(published).first_k_dense_replace == 2
    with pytest.raises(UserError, match="mlp_layer_types"):
        DeepseekV32Config.from_hf({**published, "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_lora_rank": None}, "query latent"),
        ({"index_head_dim": 8}, "index_head_dim 8 with qk_rope_head_dim 16"),
        ({"index_head_dim": 24, "index_fp8": True}, "power of two"),
        ({"index_topk": 0}, "index_topk 0"),
        ({"index_n_heads": 0}, "index_n_heads 0"),
    ],
)
def test_impossible_indexers_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        replace(V32_MICRO, **change).check()
    assert message in str(refused.value)


def test_what_the_selection_hangs_on_is_kept_in_float32(pair: tuple[Any, CausalLM], tmp_path: Path) -> None:
    oracle, _ = pair
    model = nautile.load(tmp_path / "hf", dtype=torch.bfloat16)
    wide = {name.split(".indexer.")[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"k_norm.weight", "k_norm.bias", "weights_proj.weight"}
    tokens = some_tokens()
    with torch.no_grad():
        close = F.cosine_similarity(model(tokens).flatten(), oracle(tokens).logits.flatten(), dim=0)
    assert close > 0.8
    nautile.save(model, tmp_path / "bf16")
    again = nautile.load(tmp_path / "bf16", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(t, again[name]) and t.dtype == again[name].dtype for name, t in model.state_dict().items())


def test_fp8_weights_equal_their_dequantised_twin(pair: tuple[Any, CausalLM], tmp_path: Path) -> None:
    """The published files hold the indexer's two wide projections in FP8 and its other tensors not."""
    tensors = load_file(tmp_path / "hf/model.safetensors")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    format_ = Fp8Format(scale_fmt="ue8m0")
    stored, twin = {}, {}
    for name, tensor in tensors.items():
        stored[name] = twin[name] = tensor
        if is_quantized(name, tuple(tensor.shape)):
            stored[name], stored[name + SCALE] = quantize(tensor, format_.block, format_.scale_fmt)
            twin[name] = dequantize(stored[name], stored[name + SCALE])
    narrow = {name.split(".indexer.")[1] for name in stored if ".indexer." in name and name + SCALE in stored}
    assert narrow == {"wq_b.weight", "wk.weight"}
    for folder, weights, more in (("fp8", stored, {"quantization_config": format_.to_hf()}), ("twin", twin, {})):
        (tmp_path / folder).mkdir()
        save_file(weights, tmp_path / folder / "model.safetensors", {"format": "pt"})
        (tmp_path / folder / "config.json").write_text(json.dumps({**config, **more}))
    tokens = some_tokens()
    with torch.no_grad():
        assert torch.equal(nautile.load(tmp_path / "fp8")(tokens), nautile.load(tmp_path / "twin")(tokens))


def test_the_mtp_module_has_an_indexer_and_travels_with_it(pair: tuple[Any, CausalLM], tmp_path: Path) -> None:
    _, ours = pair
    config = replace(ours.config, num_nextn_predict_layers=1)
    model = DeepseekV32ForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    nautile.save(model, tmp_path / "mtp")
    names = set(load_file(tmp_path / "mtp/model.safetensors"))
    suffixes = ["wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"]
    assert {f"model.layers.4.self_attn.indexer.{suffix}" for suffix in suffixes} <= names
    assert set(layout(config).copies) <= names
    loaded, tokens = nautile.load(tmp_path / "mtp"), some_tokens(2, 24)
    with torch.no_grad():
        (a,), (b,) = model.eval().mtp_logits(tokens), loaded.mtp_logits(tokens)
    assert a.shape == (2, 23, 259) and torch.equal(a, b)


def test_packed_documents_select_among_themselves(pair: tuple[Any, CausalLM]) -> None:
    _, ours = pair
    tokens, cuts = some_tokens(2, 40), torch.tensor([0, 18, 40, 44, 80])
    with torch.no_grad():
        packed = ours(tokens, ForwardContext.for_tokens(tokens, cuts)).flatten(0, 1)
        alone = [ours(tokens.flatten()[None, a:b])[0] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=2e-4, rtol=2e-4)


def test_rounding_to_fp8_is_a_field_and_changes_little(pair: tuple[Any, CausalLM], tmp_path: Path) -> None:
    """Head width 16 here, for Hadamard's sake."""
    oracle = build("DeepseekV32", {**SHAPE, "index_head_dim": 16})
    oracle.save_pretrained(tmp_path / "16")
    tokens = some_tokens()
    exact, rounded = nautile.load(tmp_path / "16"), nautile.load(tmp_path / "16", overrides={"index_fp8": True})
    chosen: list[Tensor] = []
    with torch.no_grad():
        expected = oracle(tokens).logits
        torch.testing.assert_close(exact(tokens), expected, atol=2e-4, rtol=2e-4)
        off = (rounded(tokens) - expected).abs()
    assert off[:, :TOPK].max() < 2e-4 < off.max()
    layers = [m.model.layers[0].self_attn.indexer for m in (exact, rounded)]
    ctx = ForwardContext.for_tokens(tokens)
    attention = exact.model.layers[0].self_attn
    x = exact.model.layers[0].input_layernorm(exact.model.embed_tokens(tokens))
    angles = attention.rope.cos_sin(ctx.positions_BS)
    seen = torch.ones(37, 37, dtype=torch.bool).tril().expand(3, -1, -1)
    for indexer in layers:
        chosen.append(indexer.mask(x, attention.query_source(x), indexer.keys(x, angles), angles, seen))
    both = (chosen[0] & chosen[1])[:, TOPK:].sum() / chosen[0][:, TOPK:].sum()
    assert 0.9 < both < 1.0
