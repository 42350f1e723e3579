"""Damaged or foreign folders are refused with a sentence; whole ones survive sharding."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nautile
from nautile.checkpoint.folder import INDEX, SINGLE, load_into, save_from
from nautile.core.errors import NautileError, UserError
from nautile.models.deepseek_v3.checkpoint import layout
from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM


@pytest.fixture
def model() -> DeepseekV3ForCausalLM:
    model = DeepseekV3ForCausalLM(V3_NANO)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_shards_and_index_hold_the_same_weights(model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    save_from(model, tmp_path, layout(V3_NANO), max_shard_bytes=300_000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and all((tmp_path / file).stat().st_size < 400_000 for file in files)
    twin = DeepseekV3ForCausalLM(V3_NANO)
    load_into(twin, tmp_path, layout(V3_NANO))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    (tmp_path / sorted(files)[1]).unlink()
    with pytest.raises(UserError, match=f"{sorted(files)[1]} is missing"):
        load_into(twin, tmp_path, layout(V3_NANO))


def test_a_tied_head_is_saved_and_tied_again(tmp_path: Path) -> None:
    """With an MTP module, whose copy of the head is the embedding, too."""
    model = DeepseekV3ForCausalLM(replace(V3_NANO, tie_word_embeddings=True))
    model.init_weights(torch.Generator().manual_seed(0))
    nautile.save(model, tmp_path)
    twin = nautile.load(tmp_path)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("sizes", [(300_000, 10**9), (10**9, 300_000)])
def test_saving_over_an_earlier_model_leaves_only_the_new_one(sizes: tuple[int, int], tmp_path: Path) -> None:
    for seed, size in enumerate(sizes):
        model = DeepseekV3ForCausalLM(V3_NANO)
        model.init_weights(torch.Generator().manual_seed(seed))
        save_from(model, tmp_path, layout(V3_NANO), max_shard_bytes=size)
    twin = DeepseekV3ForCausalLM(V3_NANO)
    load_into(twin, tmp_path, layout(V3_NANO))
    assert torch.equal(model.lm_head.weight, twin.lm_head.weight)
    assert (tmp_path / SINGLE).exists() != (tmp_path / INDEX).exists()


def test_a_wrong_shape_is_named_and_nothing_is_copied(model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    nautile.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "kv_lora_rank": 40}))
    with pytest.raises(UserError, match=r"kv_a_layernorm.weight is \[32\], not \[40\]"):
        nautile.load(tmp_path)


def test_missing_and_unexpected_tensors_are_listed(model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    nautile.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "q_lora_rank": None}))
    with pytest.raises(UserError) as caught:
        nautile.load(tmp_path)
    assert "missing:\n    model.layers.0.self_attn.q_proj.weight" in str(caught.value)
    assert "unexpected:\n    model.layers.0.self_attn.q_a_layernorm.weight" in str(caught.value)


def test_a_cut_file_is_called_damaged(model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    nautile.save(model, tmp_path)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        nautile.load(tmp_path)


def test_an_unknown_family_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v33"}))
    with pytest.raises(UserError, match="did you mean 'deepseek_v3'"):
        nautile.load(tmp_path)


def test_an_fp8_checkpoint_is_refused_as_such(model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    nautile.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    with pytest.raises(UserError, match="quantised with fp8"):
        nautile.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_failure_with_a_cure(model: DeepseekV3ForCausalLM) -> None:
    with pytest.raises(NautileError, match="free some space"):
        save_from(model, Path("/dev/full"), layout(V3_NANO))


def test_weights_can_be_loaded_in_bfloat16_while_the_bias_stays_float32(
    model: DeepseekV3ForCausalLM, tmp_path: Path
) -> None:
    nautile.save(model, tmp_path)
    loaded = nautile.load(tmp_path, torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    tokens = torch.randint(0, V3_NANO.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert loaded(tokens).dtype == torch.float32
        # Most logits, not all: where two experts are nearly tied, rounding sends a token to the other one.
        assert (loaded(tokens) - model.eval()(tokens)).abs().median() < 0.05
