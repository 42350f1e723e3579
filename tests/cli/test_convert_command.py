"""``nautile convert`` as a person types it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nautile.cli.main import main


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    weights = {"model.layers.0.mlp.up_proj.weight": torch.randn(200, 130), "model.norm.weight": torch.ones(130)}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    return folder


def test_convert_prints_what_it_did(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "out"), "--dtype", "fp8", "--scale-format", "ue8m0"]) == 0
    told = capsys.readouterr()
    assert "3 tensors in 1 file," in told.out
    assert "1 quantised, 1 of another dtype now" in told.out
    assert "MB/s" in told.out
    assert "of memory at most" in told.out
    assert "converting" not in told.out
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert written["model.layers.0.mlp.up_proj.weight_scale_inv"].shape == (2, 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"


def test_a_run_is_converted_by_its_model(folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    folder.rename(tmp_path / "run" / "model")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 2
    assert not (tmp_path / "out" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "nothing to convert to"),
        (["--dtype", "int4"], "int4"),
        (["--dtype", "bf16", "--scale-format", "ue8m0"], "without --dtype fp8"),
        (["--dtype", "bf16", "--model-parallel", "2"], "without --to deepseek-demo"),
        (["--to", "deepseek-demo", "--model-parallel", "0"], "not possible"),
        (["--to", "deepseek-demo", "--dtype", "fp32"], "bf16 or fp8 only"),
        (["--to", "deepseek-demo"], "model_type 'llama'"),
    ],
)
def test_wishes_that_cannot_be_met(folder, tmp_path, capsys, words, what):
    assert main(["convert", str(folder), str(tmp_path / "out"), *words]) == 2
    told = capsys.readouterr().err
    assert what in told
    assert told.count("\n") == 3
    assert not (tmp_path / "out").exists()


def test_help_has_examples_and_needs_no_torch():
    code = (
        "import sys; from nautile.cli.main import main; code = main(['convert', '--help']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.count("nautile convert DeepSeek-V3") == 2
