"""train.precision fp8: follows bf16, resumes bit for bit, and leaves a model that knows nothing of it."""

from dataclasses import replace

import pytest
import torch

from nautile.core.errors import UserError
from nautile.core.run_folder import RunFolder
from nautile.models.io import load_model
from nautile.train.precision import resolve_precision
from nautile.train.pretrain import pretrain


@pytest.fixture
def fp8(recipe):
    return replace(recipe, train=replace(recipe.train, precision="fp8", steps=4, validate_every=2, checkpoint_every=2))


def losses(run):
    return [line["loss"] for line in run.read_metrics() if "loss" in line]


def test_a_run_follows_bf16_and_resumes_bit_for_bit(fp8, data, tmp_path, assert_same_run):
    straight = RunFolder.create(tmp_path / "straight")
    summary = pretrain(fp8, straight, data)
    assert summary["precision"] == "fp8"

    stopped = RunFolder.create(tmp_path / "stopped")
    pretrain(replace(fp8, train=replace(fp8.train, stop_after=1)), stopped, data)
    pretrain(fp8, stopped, data, resume=True)
    assert_same_run(stopped, straight)

    plain = RunFolder.create(tmp_path / "plain")
    pretrain(replace(fp8, train=replace(fp8.train, precision="bf16")), plain, data)
    assert losses(straight) != losses(plain)
    assert losses(straight) == pytest.approx(losses(plain), rel=5e-3)

    model = load_model(straight.path)
    assert not any("Fp8" in type(module).__name__ for module in model.modules())


def test_resuming_in_another_precision_is_refused(fp8, data, tmp_path):
    run = RunFolder.create(tmp_path / "run")
    pretrain(replace(fp8, train=replace(fp8.train, stop_after=1)), run, data)
    with pytest.raises(UserError) as error:
        pretrain(replace(fp8, train=replace(fp8.train, precision="bf16")), run, data, resume=True)
    assert "train.precision: fp8 → bf16" in error.value.what


def test_fp8_is_taken_only_when_asked_for_and_where_it_can_run(monkeypatch):
    precision, why = resolve_precision("fp8", torch.device("cpu"))
    assert precision == "fp8" and "emulates" in why
    assert resolve_precision("auto", torch.device("cpu"))[0] != "fp8"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(UserError, match="A100 has no FP8 products"):
        resolve_precision("fp8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_precision("fp8", torch.device("cuda")) == ("fp8", "as asked")
