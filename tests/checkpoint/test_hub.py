"""Words that name a model: folders here, and repositories of a Hub on localhost, asked by a process of its own."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from local_hub import COMMIT, LocalHub

from nautile.checkpoint import hub_progress
from nautile.checkpoint.hub import Remote, remote_name, resolve
from nautile.checkpoint.hub_errors import told
from nautile.core.errors import DiskFullError, NautileError, UserError

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"hello",
    "model.safetensors": bytes(range(256)) * 4000,
    "modeling.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "README.md": b"#",
    "original/params.json": b"{}",
}
ASK = """
import sys
from nautile.checkpoint.hub import resolve
from nautile.core.errors import NautileError
try:
    print(resolve({word!r}, **{options!r}))
except NautileError as error:
    print(f"{{type(error).__name__}}: {{error}}")
assert "torch" not in sys.modules
"""


@pytest.fixture
def hub():
    with LocalHub(dict(FILES)) as server:
        yield server


@pytest.fixture
def ask(tmp_path, hub):
    """Call resolve() in a new process, as a command does: the library reads its environment when it is imported."""

    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def asked(word="org/tiny", *, env=None, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", ASK.format(word=word, options=options)]
        variables = environment | (env or {})
        done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done

    asked.environment = environment
    return asked


def folder(done: subprocess.CompletedProcess) -> Path:
    return Path(done.stdout.strip())


def test_only_what_a_model_needs_is_downloaded_and_said_on_stderr(ask, hub):
    done = ask()
    assert sorted(file.name for file in folder(done).iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder(done) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert "org/tiny: downloading 4 of 4 files, 1.0 MB" in done.stderr
    assert "%" not in done.stderr  # no bars where there is no terminal


def test_a_second_call_fetches_nothing_and_offline_needs_no_server(ask, hub):
    first = folder(ask())
    hub.requests.clear()
    again = ask()
    assert folder(again) == first and hub.fetched() == [] and "downloading" not in again.stderr
    hub.requests.clear()
    offline = ask(env={"HF_HUB_OFFLINE": "1"})
    assert folder(offline) == first and hub.requests == []
    gone = ask(env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert folder(gone) == first and "using the copy in" in gone.stderr


def test_a_copy_in_the_cache_serves_while_the_hub_refuses(ask, hub):
    first = folder(ask())
    hub.refusal = (500, "")
    done = ask()
    assert folder(done) == first and "HfHubHTTPError" in done.stderr


def test_a_transfer_that_breaks_goes_on_from_that_byte(ask, hub):
    """In steps of the 10 MiB that huggingface_hub writes at once."""
    hub.files["model.safetensors"] = bytes(range(250)) * 48_000
    hub.cut["model.safetensors"] = 11_000_000
    done = ask()
    assert (folder(done) / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    assert ranges == [None, f"bytes={10 * 2**20}-"]


def test_a_stopped_download_goes_on_with_the_files_that_are_not_whole(ask, hub):
    ask(weights=False)
    hub.requests.clear()
    done = ask()
    assert hub.fetched() == ["model.safetensors"]
    assert "downloading 1 of 4 files" in done.stderr


def test_a_partly_cached_repository_is_no_model_offline(ask, hub):
    assert (folder(ask(weights=False)) / "config.json").exists()
    told = ask(env={"HF_HUB_OFFLINE": "1"}).stdout
    assert told.startswith("NautileError: org/tiny is not, or not wholly, in the cache")
    assert folder(ask(env={"HF_HUB_OFFLINE": "1"}, weights=False)).is_dir()


def test_a_revision_is_part_of_the_name(ask, hub):
    assert folder(ask(f"org/tiny@{COMMIT}")).name == COMMIT
    told = ask("org/tiny@v9").stdout
    assert "org/tiny@v9: no such revision" in told and f"{hub.url}/org/tiny/commits" in told
    assert "no such revision" in ask("org/tiny", revision="v9").stdout


def test_pickled_weights_are_fetched_only_on_demand(ask, hub):
    del hub.files["model.safetensors"]
    told = ask().stdout
    assert told.startswith("UserError: org/tiny holds its weights only as pickled .bin files")
    assert "--allow-pickle" in told and hub.fetched() == []
    names = [file.name for file in folder(ask(allow_pickle=True)).iterdir()]
    assert "pytorch_model.bin" in names


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((401, "GatedRepo"), "UserError: org/tiny is gated"),
        ((403, "GatedRepo"), "UserError: org/tiny is gated"),
        ((401, ""), "UserError: org/tiny: the Hub refuses access (401)"),
        ((404, "RepoNotFound"), "UserError: org/tiny is no folder here, and the Hub shows no such repository"),
        ((403, ""), "UserError: org/tiny: the Hub refuses access (403)"),
        ((429, ""), "NautileError: org/tiny: the Hub asks for patience (429)"),
        ((503, ""), "NautileError: org/tiny: the Hub answered 503"),
    ],
)
def test_refusals_are_sentences(ask, hub, refusal, said):
    hub.refusal = refusal
    told = ask().stdout
    assert told.startswith(said)
    assert ("hf auth login" in told) == (refusal[0] in (401, 403, 404, 429))


def test_no_network_and_offline_without_a_copy(ask):
    told = ask(env={"HF_ENDPOINT": "http://127.0.0.1:9"}).stdout
    assert told.startswith("NautileError: org/tiny could not be downloaded") and "check the network" in told
    told = ask(env={"HF_HUB_OFFLINE": "1"}).stdout
    assert told.startswith("NautileError: org/tiny is not, or not wholly, in the cache") and "HF_HUB_OFFLINE" in told


def test_a_name_that_cannot_exist(ask, hub):
    assert ask("org/tiny..a").stdout.startswith("UserError: org/tiny..a is no folder here and cannot be a name")


def test_a_disk_without_room_is_known_before_the_first_byte(tmp_path, monkeypatch):
    def announced():
        return hub_progress.announced("org/absent", tmp_path / "hub" / "models", COMMIT, {"a.json": 2000, "b": 2000})

    monkeypatch.setattr(hub_progress, "_free", lambda folder: 1000)
    with pytest.raises(DiskFullError, match=r"(?s)2 files of 4\.0 KB.*nothing has been downloaded"), announced():
        raise AssertionError
    monkeypatch.setattr(hub_progress, "_free", lambda folder: 5000)
    with announced() as dropped:
        assert not dropped.is_set()


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_finishes_the_files_under_way_and_a_second_one_drops_them(ask, hub, tmp_path, presses):
    """Files that are whole by then are not fetched again."""
    for number, name in enumerate(("model-1.safetensors", "model-2.safetensors")):
        hub.files[name] = bytes([number]) * 11_000_000
        hub.slow[name] = 3.0
    code = ASK.format(word="org/tiny", options={})
    process = subprocess.Popen([sys.executable, "-c", code], env=ask.environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not {*hub.slow} <= set(hub.fetched()) and time.monotonic() < deadline:
        time.sleep(0.02)
    for _ in range(presses):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "finishing the files under way" in told
    blobs = list((tmp_path / "cache" / "hub" / "models--org--tiny" / "blobs").iterdir())
    assert not [file for file in blobs if file.name.endswith(".incomplete")]
    assert sum(file.stat().st_size > 10_000_000 for file in blobs) == (2 if presses == 1 else 0)

    hub.slow.clear()
    hub.requests.clear()
    assert (folder(ask()) / "model-2.safetensors").stat().st_size == 11_000_000
    assert "config.json" not in hub.fetched()


def test_progress_is_lines_where_no_bar_can_be_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub_progress, "PLAIN_EVERY", 0.01)
    (tmp_path / "old").write_bytes(bytes(5000))
    whole = threading.Event()
    reporter = threading.Thread(target=hub_progress._report, args=("org/tiny", tmp_path, 4000, whole))
    reporter.start()
    time.sleep(0.05)
    (tmp_path / "new.incomplete").write_bytes(bytes(3000))
    time.sleep(0.1)
    whole.set()
    reporter.join()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("org/tiny: 0 B of 4.0 KB") and lines[-1].startswith("org/tiny: 3.0 KB of 4.0 KB, ")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError, "is full"),
        (RuntimeError("Data processing error: I/O error: No space left on device"), DiskFullError, "is full"),
        (RuntimeError("Data processing error: CAS service error"), NautileError, "CAS service error"),
        (OSError("Consistency check failed: file should be of size 3"), NautileError, "goes on where it stopped"),
    ],
)
def test_failures_under_way_are_sentences(error, kind, said):
    sentence = told(error, "org/tiny")
    assert type(sentence) is kind and said in str(sentence) and "kept" in str(sentence)
    assert told(PermissionError(errno.EACCES, "Permission denied"), "org/tiny") is None


def test_local_words_stay_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "runs" / "demo"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({}))
    (model / "model.safetensors").write_bytes(b"")
    assert resolve("runs/demo") == Path("runs/demo")
    assert resolve(model / "config.json") == model
    with pytest.raises(UserError, match=f"name its folder: {model}"):
        resolve(str(model / "model.safetensors"))
    with pytest.raises(UserError, match="did you mean 'runs/demo'"):
        resolve("runs/dmo")
    with pytest.raises(UserError, match="no such folder"):
        resolve(Path("org/tiny"))


@pytest.mark.parametrize(
    ("word", "remote"),
    [
        ("deepseek-ai/DeepSeek-V2-Lite", Remote("deepseek-ai/DeepSeek-V2-Lite")),
        ("deepseek-ai/DeepSeek-V3.2-Exp@main", Remote("deepseek-ai/DeepSeek-V3.2-Exp", "main")),
        ("org/name@refs/pr/4", Remote("org/name", "refs/pr/4")),
        ("name", None),
        ("/org/name", None),
        ("../name", None),
        ("org/name/more", None),
        (Path("org/name"), None),
    ],
)
def test_what_looks_like_a_name_on_the_hub(word, remote):
    assert remote_name(word) == remote
