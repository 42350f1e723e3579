import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from nautile.core.errors import NautileError, UserError
from nautile.core.run_folder import RunFolder
from nautile.data.baselines import bigram_bits_per_byte
from nautile.data.loader import Loader
from nautile.layers.moe.balance import update_bias_
from nautile.models.io import load_model
from nautile.text.tokenizer import Tokenizer
from nautile.train.pretrain import pretrain
from nautile.train.recipe import load_recipe
from nautile.train.validate import bits_per_byte


def test_the_run_folder_holds_everything(straight, recipe, data):
    assert load_recipe(str(straight.config_path)) == replace(recipe, train=replace(recipe.train, threads=1))
    assert [line["step"] for line in straight.read_metrics()] == list(range(1, 9))
    assert [p.name for p in sorted(straight.checkpoints.iterdir())] == ["step-000006", "step-000008"]
    assert [s["step"] for s in straight.samples.read()] == [4, 8]
    summary = straight.read_summary()
    assert summary["finished"] and summary["stopped_by"] is None
    assert summary["tokens"] == 8 * 4 * 32
    for key in ("val_bits_per_byte", "unigram_bits_per_byte", "bigram_bits_per_byte", "wall_seconds", "parameters"):
        assert summary[key] > 0
    assert Tokenizer.load(straight.model).vocab_size == data.tokenizer.vocab_size


def test_metrics_hold_what_the_report_needs(straight, recipe):
    line = straight.read_metrics()[3]
    assert {"loss", "mtp_loss", "lr", "tokens_per_second", "gflops", "grad_norm", "val_bits_per_byte"} <= line.keys()
    tokens = recipe.train.batch_size * recipe.train.sequence_length
    assert [sum(counts) for counts in line["expert_counts"]] == [tokens * recipe.model.num_experts_per_tok] * 2
    assert straight.read_metrics()[-1]["bias_speed"] == 0.01 and straight.read_metrics()[-1]["mtp_weight"] == 0.1


def test_the_model_learns(straight):
    lines = straight.read_metrics()
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5


def test_same_seed_same_run_other_seed_another(recipe, data, tmp_path, straight, assert_same_run):
    again = RunFolder.create(tmp_path / "again")
    pretrain(recipe, again, data)
    assert_same_run(again, straight)
    other = RunFolder.create(tmp_path / "other")
    pretrain(replace(recipe, seed=1, train=replace(recipe.train, stop_after=1)), other, data)
    assert other.read_metrics()[0]["loss"] != straight.read_metrics()[0]["loss"]


def test_the_exported_model_is_the_trained_one(straight, data, recipe):
    model = load_model(straight.path)
    bits = bits_per_byte(model, data.validation, recipe.train.sequence_length, 256)
    assert bits == pytest.approx(straight.read_summary()["val_bits_per_byte"], rel=1e-6)


def test_router_biases_move_against_the_load_once_per_step(recipe, data, tmp_path):
    run = RunFolder.create(tmp_path / "run")
    pretrain(replace(recipe, train=replace(recipe.train, stop_after=1)), run, data)
    saved = load_file(run.checkpoints / "step-000001" / "model.safetensors")
    biases = [tensor for name, tensor in saved.items() if name.endswith("e_score_correction_bias")]
    for bias_E, counts in zip(biases, run.read_metrics()[0]["expert_counts"], strict=True):
        expected = torch.zeros_like(bias_E)
        update_bias_(expected, torch.tensor(counts), 0.01)
        assert bias_E.any() and torch.equal(bias_E, expected)


def test_micro_batches_read_the_same_samples(recipe, data, tmp_path, straight):
    run = RunFolder.create(tmp_path / "run")
    pretrain(replace(recipe, train=replace(recipe.train, micro_batch_size=None, stop_after=2)), run, data)
    for ours, theirs in zip(run.read_metrics(), straight.read_metrics(), strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_bits_per_byte_of_a_uniform_model(recipe, data):
    model = load_model_of_zeros(recipe)
    S = recipe.train.sequence_length
    tokens = data.validation.window(1, 8 * S)
    expected = len(tokens) * torch.tensor(float(recipe.model.vocab_size)).log2() / data.validation.count_bytes(tokens)
    assert bits_per_byte(model, data.validation, S, 8 * S) == pytest.approx(expected.item(), rel=1e-5)


def load_model_of_zeros(recipe):
    from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(recipe.model)
    model.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def test_several_ranks_are_refused(recipe, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2"):
        pretrain(recipe, RunFolder.create(tmp_path / "run"), data)


@pytest.mark.parametrize("rows", [290, 400])
def test_a_tokenizer_of_another_vocabulary_is_refused(rows, recipe, data, tmp_path):
    other = replace(
        recipe, model=replace(recipe.model, vocab_size=rows), tokenizer=replace(recipe.tokenizer, vocab_size=rows)
    )
    with pytest.raises(UserError, match=rf"300 tokens, model\.vocab_size is {rows}"):
        pretrain(other, RunFolder.create(tmp_path / "run"), data)


def test_a_tokenizer_that_ends_documents_otherwise_than_the_config_is_refused(recipe, data, tmp_path):
    other = replace(recipe, model=replace(recipe.model, eos_token_id=7))
    with pytest.raises(UserError, match=r"--model\.bos-token-id 0 --model\.eos-token-id 1"):
        pretrain(other, RunFolder.create(tmp_path / "run"), data)


def test_held_out_text_shorter_than_a_window_is_refused_before_training(recipe, data, tmp_path):
    longer = data.validation.num_tokens
    assert longer < data.train.num_tokens, "or training itself would be refused"
    long = replace(
        recipe,
        model=replace(recipe.model, max_position_embeddings=longer),
        train=replace(recipe.train, sequence_length=longer),
    )
    run = RunFolder.create(tmp_path / "run")
    with pytest.raises(UserError, match="1 row of"):
        pretrain(long, run, data)
    assert not run.config_path.exists()


def test_baselines_are_scored_on_the_tokens_of_the_last_validation(straight, recipe, data):
    targets = recipe.train.final_validation_tokens // recipe.train.sequence_length * recipe.train.sequence_length
    assert targets < data.validation.num_tokens - 1
    expected = bigram_bits_per_byte(data.train, data.validation, data.tokenizer.vocab_size, targets)
    assert straight.read_summary()["bigram_bits_per_byte"] == expected


def test_a_gradient_that_is_not_finite_stops_before_the_update(recipe, data, tmp_path, monkeypatch):
    def poisoned(self):
        batch = original(self)
        if self.state()["samples"] > 3 * recipe.train.batch_size:
            model["lm_head"].data.fill_(float("nan"))
        return batch

    original, model = Loader.next_batch, {}
    monkeypatch.setattr(Loader, "next_batch", poisoned)
    run = RunFolder.create(tmp_path / "run")
    from nautile.train import begin

    build = begin.new_state

    def keep_head(*args):
        state = build(*args)
        model["lm_head"] = state.model.lm_head.weight
        return state

    monkeypatch.setattr(begin, "new_state", keep_head)
    with pytest.raises(NautileError, match="step 4: the gradient's norm is nan"):
        pretrain(recipe, run, data)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000003"]
    assert json.loads((run.checkpoints / "step-000003" / "state.json").read_text())["step"] == 3
