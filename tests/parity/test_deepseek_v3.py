"""Our DeepSeek-V3 against transformers' on the same tiny random weights: logits, gradients, decoding, saving."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import VARIANTS, deepseek_v3
from transformers import DeepseekV3ForCausalLM as Oracle

import nautile
from nautile.core.context import ForwardContext
from nautile.layers.moe import router as router_module
from nautile.models.deepseek_v3.checkpoint import layout
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM


@pytest.fixture(params=list(VARIANTS))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Oracle, DeepseekV3ForCausalLM]:
    oracle = deepseek_v3(**VARIANTS[request.param])
    oracle.save_pretrained(tmp_path)
    return oracle, nautile.load(tmp_path)


@pytest.fixture
def v3_pair(tmp_path: Path) -> tuple[Oracle, DeepseekV3ForCausalLM]:
    oracle = deepseek_v3()
    oracle.save_pretrained(tmp_path)
    return oracle, nautile.load(tmp_path)


def some_tokens(batch: int = 3, length: int = 37) -> torch.Tensor:
    return torch.randint(0, 259, (batch, length), generator=torch.Generator().manual_seed(7))


def test_logits(pair: tuple[Oracle, DeepseekV3ForCausalLM]) -> None:
    oracle, ours = pair
    tokens = some_tokens()
    with torch.no_grad():
        expected = oracle(tokens).logits
        assert expected.std() > 0.5, "the oracle must say something"
        torch.testing.assert_close(ours(tokens), expected, atol=2e-4, rtol=2e-4)


def test_gradients(pair: tuple[Oracle, DeepseekV3ForCausalLM]) -> None:
    oracle, ours = pair
    tokens, weights = some_tokens(2, 21), torch.randn(2, 21, 259, generator=torch.Generator().manual_seed(3))
    (oracle(tokens).logits * weights).sum().backward()
    (ours(tokens) * weights).sum().backward()
    published = dict(oracle.named_parameters())
    typical = torch.stack([p.grad.norm() for p in oracle.parameters()]).median()
    compared = 0
    for name, parameter in ours.named_parameters():
        expected = published[name].grad
        if ours.config.num_experts_per_tok == 1 and name.endswith("mlp.gate.weight"):
            # One normalised expert has weight 1 whatever its score: what is left of the gradient is rounding around 0.
            assert parameter.grad.norm() < 1e-5 * typical and expected.norm() < 1e-5 * typical
        else:
            error = (parameter.grad - expected).norm() / expected.norm()
            assert error < 1e-3, f"{name}: gradient off by {error:.1e} of its norm"
        compared += 1
    assert compared == len(published)


def test_greedy_decode_with_cache(pair: tuple[Oracle, DeepseekV3ForCausalLM]) -> None:
    """Prompts of several lengths decoded together, absorbed, over the latent cache."""
    oracle, ours = pair
    prompts = [some_tokens(1, length) for length in (1, 9, 30)]
    params = nautile.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    outputs = nautile.LLM(ours).generate([prompt[0].tolist() for prompt in prompts], params)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = oracle.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert output.token_ids == expected[0, prompt.shape[1] :].tolist()


def test_absorbed_form_equals_expanded_form(v3_pair: tuple[Oracle, DeepseekV3ForCausalLM]) -> None:
    _, model = v3_pair
    attention = model.double().model.layers[1].self_attn
    tokens = some_tokens(2, 33)
    ctx = ForwardContext.for_tokens(tokens)
    x = torch.randn(2, 33, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    projected = attention.project(x, ctx)
    seen = torch.ones(33, 33, dtype=torch.bool).tril().expand(2, -1, -1)
    expanded, absorbed = attention.attend_expanded(*projected), attention.attend_absorbed(*projected, seen)
    torch.testing.assert_close(expanded, absorbed, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(o.sin().sum(), x, retain_graph=True)[0] for o in (expanded, absorbed)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)


def test_documents_do_not_see_each_other(v3_pair: tuple[Oracle, DeepseekV3ForCausalLM]) -> None:
    """A packed row with document starts gives the logits that the masked documents give.

    Rotary positions run on through the row; only differences matter, so each document may be run alone.
    """
    _, model = v3_pair
    tokens = some_tokens(2, 30)
    cuts = torch.tensor([0, 11, 30, 34, 60])
    with torch.no_grad():
        packed = model(tokens, ForwardContext.for_tokens(tokens, cuts)).flatten(0, 1)
        alone = [model(tokens.flatten()[None, a:b])[0] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        across = model(tokens).flatten(0, 1)
    torch.testing.assert_close(packed, torch.cat(alone), atol=2e-4, rtol=2e-4)
    assert (packed - across).abs().max() > 0.1


def test_negative_biases_show_a_wrong_mask(
    v3_pair: tuple[Oracle, DeepseekV3ForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masking dropped groups with 0 instead of −inf, as older code did, is visible in this fixture."""
    oracle, ours = v3_pair
    right = router_module.keep_best_groups

    def masks_with_zero(choice, group_scores, topk_group):
        kept = right(choice, group_scores, topk_group)
        return torch.where(kept.isinf(), torch.zeros(()), kept)

    monkeypatch.setattr(router_module, "keep_best_groups", masks_with_zero)
    with torch.no_grad():
        assert (ours(some_tokens()) - oracle(some_tokens()).logits).abs().max() > 0.1


def test_transformers_reads_what_we_save(pair: tuple[Oracle, DeepseekV3ForCausalLM], tmp_path: Path) -> None:
    oracle, ours = pair
    nautile.save(ours, tmp_path / "ours")
    again = Oracle.from_pretrained(tmp_path / "ours", attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(some_tokens()).logits, oracle(some_tokens()).logits, atol=1e-5, rtol=1e-5)
    reloaded = nautile.load(tmp_path / "ours")
    for (name, a), (_, b) in zip(ours.state_dict().items(), reloaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_both_config_spellings(tmp_path: Path) -> None:
    oracle = deepseek_v3()
    oracle.save_pretrained(tmp_path)
    new_spelling = json.loads((tmp_path / "config.json").read_text())
    config = nautile.load(tmp_path).config
    assert "rope_parameters" in new_spelling and config.rope_scaling.factor == 40.0
    published = config.to_hf()
    assert "rope_parameters" not in published
    assert type(config).from_hf(published) == config


def test_mtp_weights_travel_in_their_published_place(tmp_path: Path) -> None:
    """MTP tensors are named model.layers.N.*, beside copies of the embedding and the head."""
    oracle = deepseek_v3()
    oracle.save_pretrained(tmp_path / "hf")
    config = replace(nautile.load(tmp_path / "hf").config, num_nextn_predict_layers=2)
    model = DeepseekV3ForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    nautile.save(model, tmp_path / "mtp")
    from safetensors import safe_open

    with safe_open(tmp_path / "mtp" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert torch.equal(file.get_tensor("model.layers.5.embed_tokens.weight"), model.model.embed_tokens.weight)
    suffixes = ["enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "shared_head.head.weight"]
    suffixes += ["self_attn.kv_b_proj.weight", "mlp.experts.7.down_proj.weight", "mlp.gate.e_score_correction_bias"]
    for layer in (4, 5):
        assert {f"model.layers.{layer}.{suffix}" for suffix in suffixes} <= names
    loaded = nautile.load(tmp_path / "mtp")
    tokens = some_tokens(2, 12)
    with torch.no_grad():
        ours, theirs = model.eval().mtp_logits(tokens), loaded.mtp_logits(tokens)
    assert [tuple(logits.shape) for logits in ours] == [(2, 11, 259), (2, 10, 259)]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert set(layout(config).copies) <= names
