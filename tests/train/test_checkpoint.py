from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nautile.core.errors import NautileError
from nautile.core.run_folder import RunFolder
from nautile.train.checkpoint import checkpoints, load_checkpoint, model_tensors, remove_leftovers, save_checkpoint
from nautile.train.losses import pretrain_loss
from nautile.train.state import new_state

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run")


def trained(recipe, data):
    """A state one step away from its beginning."""
    state = new_state(recipe, data, CPU)
    losses = pretrain_loss(state.model, next(state.loader).tokens_BW, 0.3, 1e-4)
    losses.total.backward()
    state.optimizer.step()
    state.model.routers()[0].e_score_correction_bias.fill_(0.25)
    state.step = 1
    return state


@pytest.mark.parametrize("tied", [False, True])
def test_everything_comes_back(tied, recipe, data, run):
    recipe = replace(recipe, model=replace(recipe.model, tie_word_embeddings=tied))
    before = trained(recipe, data)
    folder = save_checkpoint(run, before, "data", keep=2)
    drawn = torch.rand(3)
    after = new_state(recipe, data, CPU)
    load_checkpoint(folder, after, "data")

    ours, theirs = model_tensors(before.model), model_tensors(after.model)
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    assert ("lm_head.weight" in ours) != tied
    for p, q in zip(before.model.parameters(), after.model.parameters(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert before.optimizer.state[p][moment].equal(after.optimizer.state[q][moment])
    assert torch.equal(next(before.loader).tokens_BW, next(after.loader).tokens_BW)
    assert torch.equal(torch.rand(3), drawn)
    assert after.step == 1 and (not tied or after.model.lm_head.weight is after.model.model.embed_tokens.weight)


def test_the_newest_are_kept_and_ordered_by_step(recipe, data, run):
    state = trained(recipe, data)
    for state.step in (999_999, 1, 1_000_000, 20):
        save_checkpoint(run, state, "data", keep=2)
    assert [p.name for p in checkpoints(run)] == ["step-999999", "step-1000000"]


def test_half_written_checkpoints_are_neither_found_nor_kept(recipe, data, run):
    save_checkpoint(run, trained(recipe, data), "data", keep=2)
    (run.checkpoints / ".step-000002.host-1.partial").mkdir()
    assert [p.name for p in checkpoints(run)] == ["step-000001"]
    remove_leftovers(run)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000001"]


def test_tensors_of_another_model_are_refused_by_name(recipe, data, run):
    folder = save_checkpoint(run, trained(recipe, data), "data", keep=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.extra.weight"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NautileError, match=r"model\.extra\.weight is in only one"):
        load_checkpoint(folder, new_state(recipe, data, CPU), "data")
