"""SIGKILL at any moment leaves a run that resumes and ends as if never killed."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from nautile.core.config import dump_yaml
from nautile.core.run_folder import RunFolder
from nautile.train.pretrain import pretrain


def killed_at_sync(number, recipe, data, path):
    """Train in this process, which dies when it is about to flush its `number`-th file or folder to the disk."""
    left = number
    sync = os.fsync

    def count(handle):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(handle)

    os.fsync = count
    started = (path / "config.yaml").exists()
    pretrain(recipe, RunFolder.open(path) if started else RunFolder.create(path), data, resume=started)


def test_kills_in_the_middle_of_every_kind_of_write(recipe, data, tmp_path, straight, assert_same_run):
    """Every file of a checkpoint, of the records and of the export is flushed before its rename, so counting the
    flushes reaches each half-written state."""
    fork = multiprocessing.get_context("fork")
    path = tmp_path / "run"
    codes = []
    # Through the first records and checkpoint, then the later checkpoints, then export and summary.
    for number in (*range(1, 13), *range(8, 15, 2), *range(9, 16, 2), *range(9, 18), 10_000):
        child = fork.Process(target=killed_at_sync, args=(number, recipe, data, path))
        child.start()
        child.join(60)
        codes.append(child.exitcode)
        if child.exitcode == 0:
            break
    assert codes[-1] == 0 and codes.count(-signal.SIGKILL) == len(codes) - 1 >= 20
    assert_same_run(RunFolder.open(path), straight)
    assert [p.name for p in sorted((path / "checkpoints").iterdir())] == ["step-000006", "step-000008"]


@pytest.mark.slow
def test_kills_from_outside_through_the_command_line(recipe, tmp_path, straight, assert_same_run):
    dump_yaml(recipe, tmp_path / "tiny.yaml")
    out, draw = tmp_path / "run", random.Random(time.time_ns())
    nautile = [sys.executable, "-m", "nautile", "pretrain"]
    environment = {**os.environ, "COLUMNS": "100"}
    for attempt in range(8):
        started = (out / "config.yaml").exists()
        command = (
            [*nautile, "--resume", str(out)] if started else [*nautile, str(tmp_path / "tiny.yaml"), "--out", str(out)]
        )
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            _, told = process.communicate(timeout=60 if attempt == 7 else draw.uniform(1.5, 5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            continue
        assert process.returncode == 0, told
        break
    assert_same_run(RunFolder.open(out), straight)
