import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nautile.core.atomic import disk_errors
from nautile.core.errors import DiskFullError, NautileError, UserError
from nautile.core.run_folder import JsonLines, RunFolder


def started(path: Path) -> RunFolder:
    run = RunFolder.create(path)
    run.config_path.write_text("name: x\n")
    return run


def test_create_refuses_a_folder_that_holds_a_run(tmp_path):
    run = started(tmp_path / "a")
    assert run.checkpoints.is_dir()
    with pytest.raises(UserError, match=r"(?s)already holds a run.*--resume .*/a"):
        RunFolder.create(run.path)


def test_create_accepts_what_a_run_killed_at_once_left(tmp_path):
    RunFolder.create(tmp_path / "a")
    assert RunFolder.create(tmp_path / "a").checkpoints.is_dir()


def test_create_refuses_a_file(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "a")
    with pytest.raises(NautileError, match="cannot write"):
        RunFolder.create(tmp_path / "a" / "b")


def test_open_names_the_nearest_run(tmp_path):
    started(tmp_path / "demo")
    assert RunFolder.open(tmp_path / "demo").path == tmp_path / "demo"
    with pytest.raises(UserError, match=r"(?s)holds no run.*no such folder.*did you mean .*/demo'"):
        RunFolder.open(tmp_path / "dmo")
    with pytest.raises(UserError, match="start one: nautile demo"):
        RunFolder.open(tmp_path / "empty" / "x")


def test_metrics_are_read_back_in_order(tmp_path):
    run = started(tmp_path / "a")
    assert run.read_metrics() == []
    run.metrics.append({"step": 1, "loss": 2.5, "load": [1, 2]})
    run.metrics.append({"step": 2, "loss": float("nan"), "note": "ä\n"})
    assert run.read_metrics() == [
        {"step": 1, "loss": 2.5, "load": [1, 2]},
        {"step": 2, "loss": None, "note": "ä\n"},
    ]
    assert len(run.metrics.path.read_text("utf-8").splitlines()) == 2


def test_a_torn_last_line_is_not_read_and_not_appended_to(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.append({"step": 1})
    with lines.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert lines.read() == [{"step": 1}]
    lines.append({"step": 3})
    assert lines.read() == [{"step": 1}, {"step": 3}]


def test_a_file_of_only_a_torn_line(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.path.write_text('{"st')
    assert lines.read() == []
    lines.append({"step": 1})
    assert lines.read() == [{"step": 1}]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    run = started(tmp_path / "a")
    for step in (10, 20, 30):
        run.metrics.append({"step": step})
        run.samples.append({"step": step, "text": "ä"})
    run.truncate_metrics_after(20)
    assert [record["step"] for record in run.read_metrics()] == [10, 20]
    assert [record["step"] for record in run.samples.read()] == [10, 20]
    run.metrics.append({"step": 21})
    assert [record["step"] for record in run.read_metrics()] == [10, 20, 21]


def test_summary_is_absent_until_written(tmp_path):
    run = started(tmp_path / "a")
    assert run.read_summary() is None
    run.write_summary({"val_bits_per_byte": 1.5, "tokens": 10, "bad": float("inf")})
    assert run.read_summary() == {"val_bits_per_byte": 1.5, "tokens": 10, "bad": None}


def test_env_records_machine_and_versions(tmp_path):
    run = started(tmp_path / "a")
    run.write_env()
    env = json.loads((run.path / "env.json").read_text())
    assert env["cores"] >= 1
    assert env["versions"]["torch"]
    assert env["command"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_names_the_file(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.path.symlink_to("/dev/full")
    with pytest.raises(NautileError, match=r"(?s)cannot write .*m\.jsonl.*No space left.*free some space"):
        lines.append({"step": 1})


def test_a_full_disk_is_told_how_to_go_on_once_the_run_began(tmp_path):
    run = RunFolder.create(tmp_path / "a")
    for begun, cure in ((False, "run the same command again"), (True, f"then: nautile pretrain --resume {run.path}")):
        if begun:
            run.config_path.write_text("name: x\n")
        with pytest.raises(DiskFullError) as error, run.resumable(), disk_errors(run.summary_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert error.value.cure == f"free some space on that disk{', ' if begun else ' and '}{cure}"
        assert error.value.what == f"cannot write {run.summary_path}"


HOLDS_THE_LOCK = """
import sys, time
from nautile.core.run_folder import RunFolder
with RunFolder.open(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_one_process_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path):
    run = started(tmp_path / "a")
    holder = subprocess.Popen([sys.executable, "-c", HOLDS_THE_LOCK, run.path], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(UserError, match=r"(?s)another process is training in .*/a.*checkpoints.*--out"),
            run.locked(),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with run.locked():
        pass
    with run.locked():
        pass


@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with started(tmp_path / "a").locked():
        pass
    assert "No locks available; nothing keeps a second process" in capsys.readouterr().err
