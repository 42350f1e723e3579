"""A model on a Hub on localhost: checked by its headers before it is downloaded, then loaded by its name."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from local_hub import LocalHub
from safetensors.torch import load_file

import nautile
from nautile.checkpoint.save import save_from
from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.family import build_model, layout_of

RUN = "import sys; from nautile.cli.main import main; sys.exit(main(sys.argv[1:]))"
LOAD = "import sys, nautile; print(sum(p.double().sum().item() for p in nautile.load(sys.argv[1]).parameters()))"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny model in three shards, as the files of a repository."""
    folder = tmp_path_factory.mktemp("published")
    model = build_model(replace(V3_NANO, num_nextn_predict_layers=1))
    model.init_weights(torch.Generator().manual_seed(0))
    nautile.save(model, folder)
    save_from(model, folder, layout_of(model.config), max_shard_bytes=1_000_000)
    return model, {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def hub(published):
    with LocalHub(dict(published[1])) as server:
        yield server


@pytest.fixture
def run(tmp_path, hub):
    def ran(code, *words, **variables) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return ran


def test_a_model_is_checked_before_it_is_downloaded_and_loaded_by_its_name(run, hub, published):
    done = run(RUN, "check", "org/tiny", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    shards = sorted(name for name in hub.files if name.endswith(".safetensors"))
    assert report["whole"] and report["weights"]["files"] == len(shards) > 1
    starts = [asked for _, path, asked in hub.requests if path.endswith(".safetensors")]
    assert sorted(starts) == ["bytes=0-100000"] * len(shards)

    done = run(LOAD, "org/tiny")
    assert done.returncode == 0, done.stderr
    expected = sum(p.double().sum().item() for p in published[0].parameters())
    assert float(done.stdout) == pytest.approx(expected, rel=1e-12)
    assert f"downloading {len(shards)} of" in done.stderr  # the check had fetched everything else

    hub.requests.clear()
    done = run(RUN, "check", "org/tiny", "--json", HF_HUB_OFFLINE="1")
    assert json.loads(done.stdout)["whole"] and hub.requests == []


def test_a_repository_that_lacks_tensors_is_refused_before_the_download(run, hub):
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps(config | {"q_lora_rank": None}).encode()
    done = run(RUN, "check", "org/tiny")
    assert done.returncode == 2
    assert "  missing:\n    model.layers.0.self_attn.q_proj.weight" in done.stdout


@pytest.mark.parametrize("absent", ["model.safetensors", "config.json"])
def test_a_repository_without_safetensors_or_config(run, hub, absent):
    for name in [name for name in hub.files if name.startswith(("model", absent))]:
        del hub.files[name]
    told = run(RUN, "check", "org/tiny@main").stderr
    assert f"error: org/tiny@main has no {absent}" in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt_oss"}, "model_type 'gpt_oss' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised with awq"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused_before_its_weights_are_fetched(run, hub, change, said):
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps(config | change).encode()
    done = run(LOAD, "org/tiny")
    assert done.returncode and said in done.stderr
    done = run(RUN, "convert", "org/tiny", "out", "--dtype", "bf16") if "awq" in said else done
    assert done.returncode and said in done.stderr
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def with_header(data: bytes, change) -> bytes:
    """The file with the entries of its header changed."""
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def shift(entries: dict, by: int) -> None:
    """Move the last tensor."""
    last = max((entry for name, entry in entries.items() if name != "__metadata__"), key=lambda e: e["data_offsets"][1])
    last["data_offsets"] = [offset + by for offset in last["data_offsets"]]


def grow(entries: dict) -> None:
    """A shape that its offsets do not have room for."""
    next(entry for name, entry in entries.items() if name != "__metadata__")["shape"][0] += 1


SHARD = "not a whole safetensors file"


@pytest.mark.parametrize(
    ("suffix", "damage", "said"),
    [
        (".safetensors", lambda data: data[:-1], f"{SHARD} (its tensors need"),
        (".safetensors", lambda data: with_header(data, lambda e: shift(e, -4)), " overlaps "),
        (".safetensors", lambda data: with_header(data, lambda e: shift(e, 4)), " leaves a gap after "),
        (".safetensors", lambda data: with_header(data, grow), "its offsets are"),
        (".safetensors", lambda data: data[:8] + b"#" + data[9:], f"{SHARD} (its header is not JSON"),
        (".safetensors", lambda data: b"", "the file has 0"),
        (".safetensors", lambda data: b"\xff" * 8 + data[8:], "promise a header of"),
        ("index.json", lambda data: b"{", "index.json:1: not JSON"),
        ("index.json", lambda data: b"{}", "it has no weight_map"),
        ("index.json", lambda data: data.replace(b': "model-', b': "../model-'), "which is not the name of a file"),
        ("config.json", lambda data: b"[" * 100_000, "config.json: not JSON"),
        ("config.json", lambda data: b"[]", "holds no JSON object"),
    ],
)
def test_damage_on_the_hub_is_told_like_damage_here(run, hub, suffix, damage, said):
    name = min(name for name in hub.files if name.endswith(suffix))
    hub.files[name] = damage(hub.files[name])
    done = run(RUN, "check", "org/tiny")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


def test_an_index_that_names_another_file_is_told_from_headers_alone(run, hub):
    index = json.loads(hub.files["model.safetensors.index.json"])
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(f for f in files if f != index["weight_map"]["model.norm.weight"])
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    done = run(RUN, "check", "org/tiny")
    assert done.returncode == 2 and "model.norm.weight is said to be in" in done.stderr


def test_pickled_weights_of_a_repository_are_looked_into_on_demand(run, hub, published, tmp_path):
    for name in [name for name in hub.files if name.startswith("model")]:
        del hub.files[name]
    nautile.save(published[0], tmp_path / "plain")
    torch.save(load_file(tmp_path / "plain" / "model.safetensors"), tmp_path / "weights.bin")
    hub.files["pytorch_model.bin"] = (tmp_path / "weights.bin").read_bytes()
    assert "has no model.safetensors" in run(RUN, "check", "org/tiny").stderr
    assert hub.fetched().count("pytorch_model.bin") == 0
    done = run(RUN, "check", "org/tiny", "--allow-pickle", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["whole"], done.stderr
