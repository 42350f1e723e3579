"""What only DeepSeek-V3 has, beside what all families are tested for: absorbed attention, packing, MTP."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CASES, deepseek_v3, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as published

import nautile
from nautile.core.context import ForwardContext
from nautile.models.causal_lm import CausalLM
from nautile.models.deepseek_v3.checkpoint import layout
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM


@pytest.fixture
def v3_pair(tmp_path: Path) -> tuple[Any, CausalLM]:
    oracle = deepseek_v3()
    oracle.save_pretrained(tmp_path)
    return oracle, nautile.load(tmp_path)


def some_tokens(batch: int = 3, length: int = 37) -> torch.Tensor:
    return torch.randint(0, 259, (batch, length), generator=torch.Generator().manual_seed(7))


def test_absorbed_form_equals_expanded_form(v3_pair: tuple[Any, CausalLM]) -> None:
    _, model = v3_pair
    attention = model.double().model.layers[1].self_attn
    tokens = some_tokens(2, 33)
    ctx = ForwardContext.for_tokens(tokens)
    x = torch.randn(2, 33, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    projected = attention.project(x, ctx)
    expanded = attention.attend_expanded(*projected)
    absorbed = attention.attend_absorbed(*projected, ctx.positions_BS)
    torch.testing.assert_close(expanded, absorbed, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(o.sin().sum(), x, retain_graph=True)[0] for o in (expanded, absorbed)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)


def test_documents_do_not_see_each_other(v3_pair: tuple[Any, CausalLM]) -> None:
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


def test_mtp_weights_travel_in_their_published_place(tmp_path: Path) -> None:
    """MTP tensors are named model.layers.N.*, beside copies of the embedding and the head."""
    oracle = deepseek_v3()
    oracle.save_pretrained(tmp_path / "hf")
    config = replace(nautile.load(tmp_path / "hf").config, num_nextn_predict_layers=2)
    model = DeepseekV3ForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    nautile.save(model, tmp_path / "mtp")
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


class PublishedMtp(nn.Module):
    """An MTP module put together from transformers' parts, as the published tensors are named."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        norm, width = published.DeepseekV3RMSNorm, config.hidden_size
        self.enorm, self.hnorm = norm(width, config.rms_norm_eps), norm(width, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.layer = published.DeepseekV3DecoderLayer(config, layer_idx=config.num_hidden_layers - 1)
        self.shared_head = nn.ModuleDict({"norm": norm(width, config.rms_norm_eps)})

    def forward(self, oracle: Any, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits about token i + 2, from the hidden states of positions 0.. and the tokens after them."""
        embedded = oracle.model.embed_tokens(tokens[:, 1:])
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden[:, :-1])], dim=-1))
        B, S, _ = x.shape
        positions = torch.arange(S)[None].expand(B, -1)
        mask = torch.full((S, S), float("-inf")).triu(1)[None, None]
        x = self.layer(
            x, attention_mask=mask, position_embeddings=oracle.model.rotary_emb(x, positions), position_ids=positions
        )
        return oracle.lm_head(self.shared_head["norm"](x))


def with_mtp(oracle: Any, module: PublishedMtp, folder: Path) -> CausalLM:
    """Our model of the oracle's folder, with the module's tensors put where published files have them."""
    oracle.save_pretrained(folder)
    config = replace(nautile.load(folder).config, num_nextn_predict_layers=1)
    ours = DeepseekV3ForCausalLM(config)
    ours.init_weights()
    nautile.save(ours, folder / "shell")
    tensors = load_file(folder / "shell" / "model.safetensors")
    tensors |= load_file(folder / "model.safetensors")
    N = oracle.config.num_hidden_layers
    for name, tensor in module.state_dict().items():
        for e in range(oracle.config.n_routed_experts):
            if name.endswith("experts.gate_up_proj"):
                gate, up = tensor[e].chunk(2)
                tensors[f"model.layers.{N}.mlp.experts.{e}.gate_proj.weight"] = gate.contiguous()
                tensors[f"model.layers.{N}.mlp.experts.{e}.up_proj.weight"] = up.contiguous()
            elif name.endswith("experts.down_proj"):
                tensors[f"model.layers.{N}.mlp.experts.{e}.down_proj.weight"] = tensor[e].contiguous()
        if ".experts." not in name:
            tensors[f"model.layers.{N}.{name.removeprefix('layer.')}"] = tensor
    tensors[f"model.layers.{N}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"model.layers.{N}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "shell" / "model.safetensors", {"format": "pt"})
    return nautile.load(folder / "shell")


def test_mtp_logits(tmp_path: Path) -> None:
    """The embedding comes first, and the hidden state is the one after the final norm; either mistake shows."""
    oracle, tokens = CASES["v3"].make(), some_tokens()
    module = randomise(PublishedMtp(oracle.config).float().eval())
    ours = with_mtp(oracle, module, tmp_path)
    with torch.no_grad():
        hidden = oracle.model(tokens).last_hidden_state
        expected = module(oracle, tokens, hidden)
        (logits,) = ours.mtp_logits(tokens)
        assert expected.std() > 0.5
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
        width = oracle.config.hidden_size
        swapped = ours.mtp[0].eh_proj.weight.roll(width, dims=1)
        right = ours.mtp[0].eh_proj.weight.clone()
        ours.mtp[0].eh_proj.weight.copy_(swapped)
        assert (ours.mtp_logits(tokens)[0] - expected).abs().max() > 0.1
        ours.mtp[0].eh_proj.weight.copy_(right)
        before_norm = []
        oracle.model.norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
        oracle(tokens)
        assert (module(oracle, tokens, before_norm[0]) - logits).abs().max() > 0.1


def test_mtp_tensors_are_written_back_in_place(tmp_path: Path) -> None:
    oracle = CASES["v3"].make()
    ours = with_mtp(oracle, randomise(PublishedMtp(oracle.config).float().eval()), tmp_path)
    nautile.save(ours, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("shell", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
