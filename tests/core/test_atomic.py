import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nautile.core.atomic import atomic_folder, atomic_write_text
from nautile.core.errors import NautileError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_script(script: str, *arguments: object, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **settings)


def test_text_replaces_the_old_file_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    atomic_write_text(path, "eins\n")
    atomic_write_text(path, "zwei ä\n")
    assert path.read_text("utf-8") == "zwei ä\n"
    assert names(path.parent) == ["a.json"]


def test_a_folder_appears_only_when_its_block_ends(tmp_path):
    target = tmp_path / "step-1"
    with atomic_folder(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("x")
        assert not target.exists()
    assert (target / "deep" / "a").read_text() == "x"
    assert names(tmp_path) == ["step-1"]


def test_a_failing_block_leaves_the_old_folder(tmp_path):
    target = tmp_path / "step-1"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as folder:
        (folder / "a").write_text("new")
        raise ZeroDivisionError
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["step-1"]
    with atomic_folder(target) as folder:
        (folder / "b").write_text("new")
    assert names(target) == ["b"]
    assert names(tmp_path) == ["step-1"]


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from nautile.core.atomic import atomic_folder, atomic_write_text
    from nautile.core.errors import NautileError
    import numpy as np
    from safetensors.numpy import save_file
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # writing past it fails like a full disk
    root, way = Path(sys.argv[1]), sys.argv[2]
    try:
        if way == "text":
            atomic_write_text(root / "kept", "x" * 200_000)
        with atomic_folder(root / "kept") as folder:
            if way == "bytes":
                (folder / "a").write_bytes(bytes(200_000))
            if way == "safetensors":
                save_file({"a": np.zeros(200_000, np.uint8)}, folder / "a")
            if way == "torch":
                import torch
                torch.save(torch.zeros(200_000), folder / "a")
    except NautileError as error:
        print(error)
"""


@pytest.mark.parametrize("way", ["text", "bytes", "safetensors", "torch"])
def test_a_full_disk_leaves_what_was_there_and_names_the_path(tmp_path, way):
    kept = tmp_path / "kept"
    if way == "text":
        kept.write_text("old")
    else:
        kept.mkdir()
        (kept / "a").write_text("old")
    done = run_script(FULL_DISK, tmp_path, way)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == f"cannot write {kept}"
    assert lines[1].endswith("nothing that was there before has changed")
    assert "free some space" in lines[2]
    assert (kept if way == "text" else kept / "a").read_text() == "old"
    assert names(tmp_path) == ["kept"]


def test_an_unwritable_place_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NautileError, match=r"cannot write .*file/a"):
        atomic_write_text(tmp_path / "file" / "a", "x")
    with pytest.raises(NautileError, match=r"cannot write .*file/b/c"), atomic_folder(tmp_path / "file" / "b" / "c"):
        pass


def test_an_input_missing_inside_a_block_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out" / "a"):
        (tmp_path / "input.txt").read_text()


def test_other_errors_inside_a_block_pass_through(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), atomic_folder(tmp_path / "a"):
        raise RuntimeError("shape mismatch")


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from nautile.core import atomic
    target, moment = Path(sys.argv[1]), sys.argv[2]
    if moment == "between renames":
        rename = Path.rename
        def once(self, to):
            rename(self, to)
            os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = once
    with atomic.atomic_folder(target) as folder:
        (folder / "a").write_text("new")
        if moment == "writing":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["writing", "between renames"])
def test_after_a_kill_the_next_writer_finds_the_old_state_and_cleans_up(tmp_path, moment):
    target = tmp_path / "step-1"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    assert run_script(KILLED, target, moment).returncode == -signal.SIGKILL
    assert target.exists() == (moment == "writing")  # between the renames there is nothing under that name
    with pytest.raises(ZeroDivisionError), atomic_folder(target):
        raise ZeroDivisionError  # a writer that fails: what stands now is what the kill left
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["step-1"]


def test_a_living_writers_folder_is_left_alone(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with atomic_folder(tmp_path / "a") as folder:
            host = folder.name.removeprefix(".a.").rpartition("-")[0]
        theirs = tmp_path / f".a.{host}-{sleeper.pid}.partial"
        theirs.mkdir()
        with atomic_folder(tmp_path / "a"):
            pass
        assert theirs.exists()
    finally:
        sleeper.kill()
        sleeper.wait()
    with atomic_folder(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["a"]
