"""Interruption, full disks, bad memory and wrong places: the destination is whole or not there."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import convert_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file

from nautile.checkpoint import shard as shard_module
from nautile.checkpoint.convert import run, shards
from nautile.checkpoint.convert.options import Options
from nautile.checkpoint.convert.place import Place
from nautile.checkpoint.convert.run import convert
from nautile.core.errors import DiskFullError, NautileError, UserError

BF16 = Options("bf16")


@pytest.fixture
def source(tmp_path):
    return cases.write(tmp_path / "src", cases.quantised(cases.tensors()), cases.fp8_config(), 4)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full_after(monkeypatch, writes):
    """The disk has room for so many writes of tensors."""
    real, count = os.pwrite, 0

    def pwrite(handle, data, position):
        nonlocal count
        count += 1
        if count > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data, position)

    monkeypatch.setattr(shard_module.os, "pwrite", pwrite)


def shards_made(monkeypatch):
    """Names of the files that are written from now on."""
    made = []
    real = shards.write
    monkeypatch.setattr(run.shards, "write", lambda shard, *rest: (made.append(shard.file), real(shard, *rest))[1])
    return made


def test_a_full_disk_leaves_finished_files_and_no_destination(tmp_path, source, monkeypatch):
    convert(source, tmp_path / "whole", BF16)
    with monkeypatch.context() as patch:
        full_after(patch, 60)
        with pytest.raises(DiskFullError):
            convert(source, tmp_path / "dst", BF16)
    assert not (tmp_path / "dst").exists()
    finished = json.loads((tmp_path / ".dst.partial" / "manifest.json").read_text())["done"]
    assert 0 < len(finished) < 4
    made = shards_made(monkeypatch)
    summary = convert(source, tmp_path / "dst", BF16)
    assert len(made) == 4 - len(finished)
    assert summary.bytes_resumed > 0
    assert contents(tmp_path / "dst") == contents(tmp_path / "whole")
    assert not (tmp_path / ".dst.partial").exists()


def test_too_little_room_is_said_before_anything_is_written(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "SPARE", 1 << 60)
        with pytest.raises(DiskFullError, match=r"needs .* MB, and .* MB are free"):
            convert(source, tmp_path / "dst", BF16)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    convert(source, tmp_path / "dst", BF16)


KILLED = """
import sys, time
from pathlib import Path
from nautile.checkpoint.convert import shards
from nautile.checkpoint.convert.options import Options
from nautile.checkpoint.convert.place import Place
from nautile.checkpoint.convert.run import convert
count, real = 0, shards.make
def slow(*work):
    global count
    count += 1
    if count > 40:
        time.sleep(0.5)
    return real(*work)
shards.make = slow
convert(Path(sys.argv[1]), Path(sys.argv[2]), Options("bf16"))
"""


def test_killed_and_continued_gives_the_same_bytes(tmp_path, source, monkeypatch):
    convert(source, tmp_path / "whole", BF16)
    process = subprocess.Popen([sys.executable, "-c", KILLED, source, tmp_path / "dst"], stderr=subprocess.DEVNULL)
    manifest = tmp_path / ".dst.partial" / "manifest.json"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (manifest.exists() and json.loads(manifest.read_text())["done"]):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "dst").exists()
    finished = json.loads(manifest.read_text())["done"]
    assert 0 < len(finished) < 4
    made = shards_made(monkeypatch)
    convert(source, tmp_path / "dst", BF16)
    assert not set(made) & set(finished)
    assert contents(tmp_path / "dst") == contents(tmp_path / "whole")


def interrupted(source, destination, monkeypatch, writes=60):
    with monkeypatch.context() as patch:
        full_after(patch, writes)
        with pytest.raises(DiskFullError):
            convert(source, destination, BF16)


def test_other_options_start_over(tmp_path, source, monkeypatch, capfd):
    interrupted(source, tmp_path / "dst", monkeypatch)
    made = shards_made(monkeypatch)
    convert(source, tmp_path / "dst", Options("fp32"))
    assert len(made) == 4
    assert "starting over" in capfd.readouterr().err
    assert cases.read(tmp_path / "dst")["model.norm.weight"].dtype == torch.float32


def test_a_changed_source_starts_over(tmp_path, source, monkeypatch, capfd):
    interrupted(source, tmp_path / "dst", monkeypatch)
    file = source / "model-00001-of-00004.safetensors"
    os.utime(file, ns=(1, 1))
    made = shards_made(monkeypatch)
    convert(source, tmp_path / "dst", BF16)
    assert len(made) == 4
    assert "the source has changed since" in capfd.readouterr().err


def test_a_finished_file_that_was_damaged_is_made_again(tmp_path, source, monkeypatch, capfd):
    convert(source, tmp_path / "whole", BF16)
    interrupted(source, tmp_path / "dst", monkeypatch)
    finished = sorted((tmp_path / ".dst.partial" / "files").glob("*.safetensors"))[0]
    flip(finished)
    made = shards_made(monkeypatch)
    convert(source, tmp_path / "dst", BF16)
    assert finished.name in made
    assert "not as it was written" in capfd.readouterr().err
    assert contents(tmp_path / "dst") == contents(tmp_path / "whole")


def flip(path: Path):
    """Change the last byte, which belongs to a tensor."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_what_the_disk_gives_back_wrongly_is_noticed(tmp_path, source, monkeypatch):
    monkeypatch.setattr(shards, "forget", flip)
    with pytest.raises(NautileError, match="differs in rows") as told:
        convert(source, tmp_path / "dst", BF16)
    assert not isinstance(told.value, UserError)
    assert not (tmp_path / "dst").exists()


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, source, monkeypatch):
    real = run._write_shards

    def changed(*work):
        real(*work)
        (source / "config.json").write_text((source / "config.json").read_text() + " ")

    monkeypatch.setattr(run, "_write_shards", changed)
    with pytest.raises(NautileError, match="has changed while it was read"):
        convert(source, tmp_path / "dst", BF16)
    assert not (tmp_path / "dst").exists()


def test_destinations_that_would_harm(tmp_path, source):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    for destination, what in (
        (source, "is the source"),
        (source / "deep" / "er", "inside the source"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "not empty"),
    ):
        with pytest.raises(UserError, match=what):
            convert(source, destination, BF16)
    before = contents(source)
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", BF16)
    assert len(cases.read(tmp_path / "empty")) == 73
    assert contents(source) == before


def test_killed_before_the_first_file_is_no_obstacle(tmp_path, source, monkeypatch):
    def killed(*work):
        raise SystemError

    with monkeypatch.context() as patch:
        patch.setattr(Place, "clear", killed)
        patch.setattr(Place, "abandon", killed)
        with pytest.raises(SystemError):
            convert(source, tmp_path / "dst", BF16)
    assert (tmp_path / ".dst.partial").exists()
    convert(source, tmp_path / "dst", BF16)


def test_killed_after_the_last_rename_is_finished_by_the_same_command(tmp_path, source, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(Place, "abandon", lambda place: None)
        convert(source, tmp_path / "dst", BF16)
    before = contents(tmp_path / "dst")
    assert (tmp_path / ".dst.partial" / "manifest.json").exists()
    with pytest.raises(UserError, match="not empty"):  # another wish
        convert(source, tmp_path / "dst", Options("fp32"))
    made = shards_made(monkeypatch)
    summary = convert(source, tmp_path / "dst", BF16)
    assert made == [] and summary.bytes_resumed == summary.bytes_out
    assert "is finished" in capfd.readouterr().err
    assert contents(tmp_path / "dst") == before and not (tmp_path / ".dst.partial").exists()
    with pytest.raises(UserError, match="not empty"):
        convert(source, tmp_path / "dst", BF16)


def test_a_folder_that_lost_a_file_does_not_pass_for_finished(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Place, "abandon", lambda place: None)
        convert(source, tmp_path / "dst", BF16)
    next((tmp_path / "dst").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="not empty"):
        convert(source, tmp_path / "dst", BF16)


def test_what_else_lies_in_the_work_folder_does_not_get_into_the_result(tmp_path, source, monkeypatch):
    convert(source, tmp_path / "whole", BF16)
    interrupted(source, tmp_path / "dst", monkeypatch)
    stale = tmp_path / ".dst.partial" / "files"
    (stale / "old.safetensors").write_bytes(b"old")
    (stale / "folder").mkdir()
    (stale / "folder" / "old").write_bytes(b"old")
    convert(source, tmp_path / "dst", BF16)
    assert contents(tmp_path / "dst") == contents(tmp_path / "whole")


def test_another_plan_starts_over(tmp_path, source, monkeypatch, capfd):
    """As after an update of nautile that writes other files from the same source with the same options."""
    interrupted(source, tmp_path / "dst", monkeypatch)
    manifest = tmp_path / ".dst.partial" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"plan": "another"}))
    made = shards_made(monkeypatch)
    convert(source, tmp_path / "dst", BF16)
    assert len(made) == 4 and "would write other files" in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["shape", "scales"])
def test_a_result_that_its_readers_would_refuse_gets_no_name(tmp_path, source, monkeypatch, damage):
    """The last look, as readers will open it: at every header, and at scales beside their weights."""
    real = run._write_beside

    def damaged(place, plan, folder):
        real(place, plan, folder)
        file = sorted(place.files.glob("*.safetensors"))[0]
        if damage == "shape":
            weights = load_file(file)
            name = min(name for name, weight in weights.items() if weight.numel() > 1)
            save_file(weights | {name: weights[name].flatten()[:-1].clone()}, file)
        else:
            (place.files / "config.json").write_text("{}")

    monkeypatch.setattr(run, "_write_beside", damaged)
    plain = cases.write(tmp_path / "plain", cases.tensors(), cases.CONFIG)
    options = BF16 if damage == "shape" else Options("fp8")
    with pytest.raises(NautileError, match="it was right when written"):
        convert(source if damage == "shape" else plain, tmp_path / "dst", options)
    assert not (tmp_path / "dst").exists()


def test_a_work_folder_that_is_not_ours_is_left_alone(tmp_path, source):
    (tmp_path / ".dst.partial").mkdir()
    (tmp_path / ".dst.partial" / "mine").write_text("")
    with pytest.raises(UserError, match="no conversion left"):
        convert(source, tmp_path / "dst", BF16)
    assert (tmp_path / ".dst.partial" / "mine").exists()


@pytest.mark.skipif(os.name != "posix", reason="no flock")
def test_two_at_once_are_refused(tmp_path, source):
    import fcntl

    (tmp_path / ".dst.partial").mkdir()
    with (tmp_path / ".dst.partial" / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            convert(source, tmp_path / "dst", BF16)


def test_threads_of_torch_are_as_before(tmp_path, source):
    before = torch.get_num_threads()
    convert(source, tmp_path / "dst", BF16, threads=2)
    assert torch.get_num_threads() == before
