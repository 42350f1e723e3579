"""A run that was stopped, killed or starved of disk continues as if nothing had happened."""

import errno
import json
import os
import resource
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest

from nautile.core import run_folder
from nautile.core.errors import NautileError, UserError
from nautile.core.run_folder import RunFolder
from nautile.train.checkpoint import checkpoints
from nautile.train.pretrain import pretrain


def stopping_after(recipe, steps):
    return replace(recipe, train=replace(recipe.train, stop_after=steps))


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run")


@pytest.mark.parametrize("first", [3, 4, 7])
def test_stopping_and_resuming_equals_going_through(first, recipe, data, run, straight, assert_same_run):
    summary = pretrain(stopping_after(recipe, first), run, data)
    assert (summary["stopped_by"], summary["step"]) == ("stop_after", first)
    assert f"nautile pretrain --resume {run.path}" in summary["next"]
    summary = pretrain(recipe, run, data, resume=True)
    assert (summary["stopped_by"], summary["step"]) == (None, 8)
    assert_same_run(run, straight)


def test_resuming_a_run_without_a_checkpoint_starts_it(recipe, data, run, straight, assert_same_run):
    pretrain(stopping_after(recipe, 2), run, data)
    for file in checkpoints(run)[-1].iterdir():
        file.unlink()
    checkpoints(run)[-1].rmdir()
    pretrain(recipe, run, data, resume=True)
    assert_same_run(run, straight)


def test_resuming_a_finished_run_does_nothing(recipe, data, run):
    first = pretrain(recipe, run, data)
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()}
    assert pretrain(recipe, run, data, resume=True) == json.loads(json.dumps(first))
    assert before == {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_later(number, recipe, data, run, straight, assert_same_run):
    def interrupt(model):
        os.kill(os.getpid(), number)
        return []

    summary = pretrain(recipe, run, data, sample=interrupt)
    assert (summary["stopped_by"], summary["step"], summary["finished"]) == (number.name, 4, False)
    assert checkpoints(run)[-1].name == "step-000004" and not run.model.exists()
    pretrain(recipe, run, data, resume=True)
    assert_same_run(run, straight)


def test_a_step_that_is_finished_twice_has_its_samples_once(recipe, data, run):
    for resume in (False, True):
        pretrain(stopping_after(recipe, 2), run, data, lambda model: [{"prompt": "p", "text": "t"}], resume=resume)
    assert [sample["step"] for sample in run.samples.read()] == [2]


def test_a_folder_in_which_another_run_began_or_goes_on_is_refused(recipe, data, run):
    with run.locked(), pytest.raises(UserError, match="another process is training"):
        pretrain(recipe, RunFolder(run.path), data)
    run.config_path.write_text("")
    with pytest.raises(UserError, match="already holds a run"):
        pretrain(recipe, run, data)


def test_another_recipe_is_refused_and_the_difference_shown(recipe, data, run):
    pretrain(stopping_after(recipe, 1), run, data)
    other = replace(recipe, seed=5, train=replace(recipe.train, steps=9, log_every=3))
    with pytest.raises(UserError) as error:
        pretrain(other, run, data, resume=True)
    assert "seed: 0 → 5; train.steps: 8 → 9" in error.value.what and "log_every" not in error.value.what


def test_bookkeeping_may_change(recipe, data, run, straight):
    pretrain(stopping_after(recipe, 2), run, data)
    pretrain(replace(recipe, train=replace(recipe.train, log_every=4, keep_checkpoints=1)), run, data, resume=True)
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 4, 8]
    assert len(checkpoints(run)) == 1
    assert run.read_metrics()[-1]["loss"] == straight.read_metrics()[-1]["loss"]


def test_automatic_precision_resumes_as_it_was_chosen(recipe, data, run, monkeypatch):
    auto = replace(recipe, train=replace(recipe.train, precision="auto"))
    monkeypatch.setattr("nautile.train.begin.resolve_precision", lambda asked, device: ("fp32", "as tested"))
    pretrain(stopping_after(auto, 1), run, data)
    monkeypatch.undo()
    monkeypatch.setattr("nautile.train.begin.measure_gemm_peak", lambda dtype: 100.0)
    assert pretrain(stopping_after(auto, 2), run, data, resume=True)["precision"] == "fp32"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("world_size", 8, "written by 8 ranks, this launch has 1"),
        ("data_fingerprint", "other", "trained on data other"),
    ],
)
def test_a_checkpoint_of_other_circumstances_is_refused(key, value, told, recipe, data, run):
    pretrain(stopping_after(recipe, 1), run, data)
    path = checkpoints(run)[-1] / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=told):
        pretrain(recipe, run, data, resume=True)


@pytest.mark.parametrize("file", ["metrics.jsonl", "summary.json", "model"])
def test_a_disk_full_outside_checkpoints_names_the_command_that_goes_on(file, recipe, data, run, monkeypatch):
    real = run_folder.disk_errors

    @contextmanager
    def full(path):
        with real(path):
            if path.name == file and checkpoints(run):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield

    monkeypatch.setattr("nautile.core.run_folder.disk_errors", full)
    monkeypatch.setattr("nautile.core.atomic.disk_errors", full)
    with pytest.raises(NautileError) as error:
        pretrain(recipe, run, data)
    assert error.value.what == f"cannot write {run.path / file}"
    assert error.value.cure.endswith(f"nautile pretrain --resume {run.path}")


def test_a_full_disk_leaves_the_earlier_checkpoint(recipe, data, run, straight, assert_same_run):
    pretrain(stopping_after(recipe, 3), run, data)
    size = (checkpoints(run)[-1] / "optimizer.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))  # larger files fail as on a full disk
    try:
        with pytest.raises(NautileError) as error:
            pretrain(recipe, run, data, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step-000006 could not be written" in error.value.what and "step-000003 is intact" in error.value.why
    assert str(run.path) in error.value.cure
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000003"]
    pretrain(recipe, run, data, resume=True)
    assert_same_run(run, straight)
