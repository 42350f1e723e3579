"""`nautile check` on whole and broken folders, most of them with headers only: the tensors' bytes are a hole."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nautile
from nautile.checkpoint.compare import targets
from nautile.checkpoint.fp8 import SCALE, Fp8Format, is_quantized, scale_shape
from nautile.checkpoint.header import encode, lay_out
from nautile.checkpoint.shard import ShardReader
from nautile.cli import check
from nautile.cli.main import main
from nautile.core.errors import UserError
from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.family import build_model, config_from_hf, layout_of
from nautile.models.presets import PRESETS

NANO = replace(V3_NANO, num_nextn_predict_layers=1)


def tensors_of(config, fp8: Fp8Format | None = None) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name → dtype and shape of every tensor of a published checkpoint."""
    with torch.device("meta"):
        model = build_model(config)
    layout = layout_of(config)
    shapes = {name: tuple(view.shape) for name, view in targets(model, layout).items()}
    for published, ours in layout.copies.items():
        shapes[published] = tuple(model.get_parameter(ours).shape)
    tensors = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = (torch.float32, shape)
        elif fp8 and is_quantized(name, shape):
            tensors[name] = (torch.float8_e4m3fn, shape)
            tensors[name + SCALE] = (torch.float32, scale_shape(shape, fp8.block))
    return tensors


def write(folder: Path, published: dict, tensors: dict, shards: int = 1) -> Path:
    """A folder whose files have their whole size and no contents: they take no room on the disk."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published))
    names = list(tensors)
    parts = [names[i::shards] for i in range(shards)]
    files = ["model.safetensors"] if shards == 1 else [f"model-{i + 1}-of-{shards}.safetensors" for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        infos = lay_out({name: tensors[name] for name in part})
        header = encode(infos, {"format": "pt"})
        (folder / file).write_bytes(header)
        os.truncate(folder / file, len(header) + max(info.end for info in infos.values()))
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def checked(capsys, *words) -> tuple[int, dict]:
    code = check.main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def no_tensor_is_read(monkeypatch):
    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(ShardReader, "read", read)
    monkeypatch.setattr(ShardReader, "read_rows", read)


@pytest.mark.parametrize("name", ["v2-lite", "moe-16b", "coder-1.3b", "r1-distill-qwen-1.5b", "v3-nano", "v32-micro"])
def test_a_whole_folder_of_each_family_in_both_spellings(capsys, tmp_path, name):
    published = PRESETS[name].to_hf()
    folder = write(tmp_path / "published", published, tensors_of(PRESETS[name]), shards=3)
    code, report = checked(capsys, folder)
    assert code == 0 and report["whole"] and report["family"] == published["model_type"]
    assert report["weights"]["files"] == 3
    if name == "moe-16b":  # transformers has no such family
        return
    from transformers import AutoConfig

    AutoConfig.for_model(**published).save_pretrained(folder)
    assert "rope_parameters" in (folder / "config.json").read_text()
    assert checked(capsys, folder)[0] == 0


def test_the_whole_of_deepseek_v3_is_checked_in_seconds_because_no_tensor_is_read(capsys, tmp_path):
    """Names, shapes and dtypes as published: 688,586,727,753 bytes in 163 files, of which 11.9 MB are headers."""
    fp8 = Fp8Format()
    published = PRESETS["v3-671b"].to_hf() | {"quantization_config": fp8.to_hf()}
    folder = write(tmp_path / "v3", published, tensors_of(PRESETS["v3-671b"], fp8), shards=163)
    assert sum(file.stat().st_blocks for file in folder.glob("*.safetensors")) * 512 < 30e6
    started = time.monotonic()
    code, report = checked(capsys, folder)
    assert time.monotonic() - started < 10
    assert code == 0
    assert (report["weights"]["tensors"], report["weights"]["bytes"]) == (91_991, 688_574_839_360)
    assert report["parameters"]["main_model"] == 671_026_419_200


def test_an_fp8_folder_with_partial_blocks(capsys, tmp_path):
    fp8 = Fp8Format((16, 16), "ue8m0")
    tensors = tensors_of(NANO, fp8)
    folder = write(tmp_path / "fp8", NANO.to_hf() | {"quantization_config": fp8.to_hf()}, tensors)
    code, report = checked(capsys, folder)
    assert code == 0
    assert report["quantised_weights"] == sum(name.endswith(SCALE) for name in tensors) > 50
    assert set(report["weights"]["dtypes"]) == {"float8_e4m3fn", "bfloat16", "float32"}
    assert check.main([str(folder)]) == 0
    assert "weights in FP8 blocks of 16 × 16, ue8m0 scales" in capsys.readouterr().out

    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    rows, columns = tensors[name + SCALE][1]
    write(
        folder, json.loads((folder / "config.json").read_text()), tensors | {name + SCALE: (torch.float32, (rows, 1))}
    )
    code, report = checked(capsys, folder)
    assert code == 2 and f"{name + SCALE} is [{rows}, 1], not [{rows}, {columns}]" in report["wrong_dtype"][0]


def test_the_three_lists_of_a_broken_folder(capsys, tmp_path):
    tensors = tensors_of(NANO)
    head, down = "lm_head.weight", "model.layers.1.mlp.experts.3.down_proj.weight"
    del tensors["model.norm.weight"], tensors["model.layers.2.mlp.experts.7.up_proj.weight"]
    tensors |= {"model.layers.9.extra.weight": (torch.bfloat16, (3,)), down: (torch.bfloat16, (64, 31))}
    tensors[head] = (torch.int8, tensors[head][1])
    folder = write(tmp_path / "broken", NANO.to_hf(), tensors)
    assert main(["check", str(folder)]) == 2
    told = capsys.readouterr().out
    assert "not whole: 2 missing, 1 unexpected, 1 wrong shape, 1 wrong dtype" in told
    for line in [
        "  missing:\n    model.layers.2.mlp.experts.7.up_proj.weight\n    model.norm.weight",
        "  unexpected:\n    model.layers.9.extra.weight",
        f"  wrong shape:\n    {down} is [64, 31], not [64, 32]",
        f"  wrong dtype:\n    {head} is int8",
    ]:
        assert line in told


def test_long_lists_are_cut_and_whole_on_demand(capsys, tmp_path):
    tensors = {name: kind for name, kind in tensors_of(NANO).items() if ".experts." not in name}
    folder = write(tmp_path / "no-experts", NANO.to_hf(), tensors)
    assert check.main([str(folder), "--lines", "3"]) == 2
    told = capsys.readouterr().out
    assert told.count("    model.layers.") == 3 and "and 69 more (--lines 0 names all)" in told
    assert check.main([str(folder), "--lines", "0"]) == 2
    assert "more" not in capsys.readouterr().out


def test_what_is_not_read_on_purpose_has_a_reason(capsys, tmp_path):
    rotary = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (torch.float32, (8,)) for i in range(3)}
    folder = write(tmp_path / "rotary", NANO.to_hf(), tensors_of(NANO) | rotary)
    code, report = checked(capsys, folder)
    assert code == 0
    assert {reason: len(names) for reason, names in report["not_read"].items()} == {
        "rotary frequencies are computed from config.json": 3,
        "a copy of model.embed_tokens.weight": 1,
        "a copy of lm_head.weight": 1,
    }


def test_a_file_cut_short_is_damaged_and_a_missing_shard_is_named(tmp_path):
    folder = write(tmp_path / "cut", NANO.to_hf(), tensors_of(NANO), shards=2)
    file = folder / "model-1-of-2.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        check.main([str(folder)])
    file.unlink()
    with pytest.raises(UserError, match=r"model-1-of-2\.safetensors is missing"):
        check.main([str(folder)])


def test_mtp_that_is_promised_and_absent_is_a_note(capsys, tmp_path):
    folder = write(tmp_path / "no-mtp", NANO.to_hf(), tensors_of(replace(NANO, num_nextn_predict_layers=0)))
    code, report = checked(capsys, folder)
    assert code == 0 and "promises MTP modules" in report["notes"][-1]


def test_files_beside_the_weights(capsys, tmp_path):
    from nautile.text.tokenizer import train_tokenizer

    folder = write(tmp_path / "beside", NANO.to_hf(), tensors_of(NANO), shards=2)
    code, report = checked(capsys, folder)
    held = report["weights"]["bytes"]
    assert report["notes"] == [
        "no tokenizer.json: text has to come as token ids",
        f"model.safetensors.index.json states total_size 1, the tensors have {held:,} bytes",
    ]
    assert report["generation_config"] is None

    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95}')
    train_tokenizer(["a b c"], 1000).save(folder)
    code, report = checked(capsys, folder)
    assert code == 0 and "24 of the embedding's 1,024 rows belong to no token" in report["notes"]
    check.main([str(folder)])
    assert "temperature 0.6, top_p 0.95 (generation_config.json)" in capsys.readouterr().out

    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json is not a JSON object" in checked(capsys, folder)[1]["notes"][-2]

    train_tokenizer(["a b c"], 1025).save(folder)
    code, report = checked(capsys, folder)
    assert code == 2 and report["problems"] == ["tokenizer.json has ids up to 1024, the embedding has 1024 rows"]
    check.main([str(folder)])
    assert "not whole: tokenizer.json has ids up to 1024" in capsys.readouterr().out


def test_ids_that_end_documents(capsys, tmp_path):
    folder = write(tmp_path / "eos", NANO.to_hf() | {"eos_token_id": [7, 2000]}, tensors_of(NANO))
    code, report = checked(capsys, folder)
    assert code == 2 and report["problems"] == [
        "eos_token_id 2000 of config.json is no row of the embedding, which has 1024"
    ]


def test_unknown_families_and_methods_are_named(tmp_path):
    folder = write(tmp_path / "odd", NANO.to_hf() | {"model_type": "deepseek_v23"}, tensors_of(NANO))
    with pytest.raises(
        UserError, match=r"model_type 'deepseek_v23' is not supported(?s:.*)nearest of them is deepseek_v"
    ):
        check.main([str(folder)])
    quantised = NANO.to_hf() | {"quantization_config": {"quant_method": "awq"}}
    write(folder, quantised, tensors_of(NANO))
    with pytest.raises(UserError, match="quantised with awq"):
        check.main([str(folder)])
    with pytest.raises(UserError, match="no such folder"):
        check.main([str(tmp_path / "absent")])
    with pytest.raises(UserError, match="--lines -1"):
        check.main([str(folder), "--lines", "-1"])


def test_a_run_folder_is_checked_by_its_model(capsys, tmp_path, monkeypatch):
    monkeypatch.undo()
    model = build_model(config_from_hf(NANO.to_hf()))
    model.init_weights(torch.Generator().manual_seed(0))
    nautile.save(model, tmp_path / "model")
    code, report = checked(capsys, tmp_path)
    assert code == 0 and report["folder"] == str(tmp_path / "model")


def test_the_folder_may_be_named_by_its_config(capsys, tmp_path):
    folder = write(tmp_path / "model", NANO.to_hf(), tensors_of(NANO))
    assert checked(capsys, folder / "config.json")[1]["folder"] == str(folder)
    with pytest.raises(UserError, match="name its folder"):
        check.main([str(folder / "model.safetensors")])


def test_pickled_weights_are_looked_into_on_demand_only(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NANO.to_hf()))
    weights = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in tensors_of(NANO).items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="--allow-pickle"):
        check.main([str(tmp_path)])
    assert checked(capsys, tmp_path, "--allow-pickle")[0] == 0
    del weights["lm_head.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert checked(capsys, tmp_path, "--allow-pickle")[1]["missing"] == ["lm_head.weight"]


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom nautile.cli import check\ntry: check.main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "Reads headers, no tensor." in done.stdout.replace("\n", " ")
