"""Dtype conversions against arithmetic written out here, and the files beside the weights."""

import json
import os
from dataclasses import replace

import convert_cases as cases
import pytest
import torch
from safetensors.torch import save_file

from nautile.checkpoint.convert import run
from nautile.checkpoint.convert.options import Options
from nautile.checkpoint.convert.run import convert
from nautile.checkpoint.fp8 import SCALE
from nautile.checkpoint.source import open_checkpoint
from nautile.core.errors import UserError

BF16, FP8 = Options("bf16"), Options("fp8")


def dequantised(tensors):
    """By repeating every scale over its block, in float64."""
    made = {}
    for name, weight in tensors.items():
        if name.endswith(SCALE):
            continue
        if name + SCALE in tensors:
            scale = tensors[name + SCALE].double()
            grown = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            weight = weight.double() * grown[: weight.shape[0], : weight.shape[1]]
            weight = weight.float().to(torch.bfloat16)
        made[name] = weight
    return made


@pytest.mark.parametrize(("config", "ue8m0"), [(cases.CONFIG, False), (cases.V32, True)], ids=["v3", "v32"])
@pytest.mark.parametrize("files", [1, 3])
def test_fp8_becomes_bf16_wherever_the_scales_lie(tmp_path, config, ue8m0, files):
    fp8 = cases.quantised(cases.tensors(config), ue8m0)
    source = cases.write(tmp_path / "src", fp8, cases.fp8_config(config, ue8m0), files)
    if files > 1:  # the case that needs looking into another file is there
        with open_checkpoint(source) as checkpoint:
            assert any(checkpoint.files[n] != checkpoint.files.get(n + SCALE, checkpoint.files[n]) for n in fp8)
    convert(source, tmp_path / "dst", BF16)
    assert cases.same(cases.read(tmp_path / "dst"), dequantised(fp8))


def test_bf16_says_so_in_config_and_index_and_keeps_file_names(tmp_path):
    fp8 = cases.quantised(cases.tensors())
    source = cases.write(tmp_path / "src", fp8, cases.fp8_config() | {"text_config": {"dtype": "float32"}}, 3)
    convert(source, tmp_path / "dst", BF16)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config == cases.CONFIG | {"text_config": {"dtype": "bfloat16"}}
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    written = cases.read(tmp_path / "dst")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    old = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["weight_map"] == {name: file for name, file in old.items() if not name.endswith(SCALE)}


@pytest.mark.parametrize("ue8m0", [False, True])
def test_fp8_export_and_back_is_quantise_dequantise_bit_for_bit(tmp_path, ue8m0):
    weights = cases.tensors()
    source = cases.write(tmp_path / "src", weights, cases.CONFIG, 2)
    convert(source, tmp_path / "fp8", Options("fp8", "ue8m0" if ue8m0 else None))
    expected = cases.quantised(weights, ue8m0)
    assert cases.same(cases.read(tmp_path / "fp8"), expected)
    assert json.loads((tmp_path / "fp8" / "config.json").read_text()) == cases.fp8_config(ue8m0=ue8m0)
    convert(tmp_path / "fp8", tmp_path / "back", BF16)
    assert cases.same(cases.read(tmp_path / "back"), dequantised(expected))
    scales = torch.cat([scale.flatten() for name, scale in expected.items() if name.endswith(SCALE)])
    assert (torch.frexp(scales).mantissa == 0.5).all() == ue8m0


def test_chunks_do_not_show(tmp_path, monkeypatch):
    weights = cases.tensors()
    source = cases.write(tmp_path / "src", weights, cases.CONFIG)
    monkeypatch.setattr("nautile.checkpoint.convert.job.CHUNK", 160 * 128)
    convert(source, tmp_path / "fp8", FP8, threads=3)
    assert cases.same(cases.read(tmp_path / "fp8"), cases.quantised(weights))
    monkeypatch.setattr("nautile.checkpoint.convert.job.CHUNK", 160 * 7)
    convert(tmp_path / "fp8", tmp_path / "back", BF16, threads=3)
    assert cases.same(cases.read(tmp_path / "back"), dequantised(cases.quantised(weights)))


@pytest.mark.parametrize(("large", "norms"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_what_was_kept_wide_is_told_by_most_numbers_not_by_most_tensors(tmp_path, large, norms):
    """Ten float32 norms beside one bfloat16 matrix were kept wide by the publisher; a float32 matrix is the folder."""
    weights = {f"model.layers.{i}.input_layernorm.weight": torch.ones(9, dtype=norms) for i in range(10)}
    weights["model.embed_tokens.weight"] = torch.ones(40, 9, dtype=large)
    convert(cases.write(tmp_path / "src", weights, None), tmp_path / "dst", BF16)
    written = cases.read(tmp_path / "dst")
    assert written["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert {written[name].dtype for name in written if "norm" in name} == {norms}


def test_stacked_tensors_are_converted_in_rows_of_their_last_dimension(tmp_path, monkeypatch):
    """A [24, 4096, 7168] tensor is held as little at a time as a matrix is."""
    weights = {"stacked": torch.randn(3, 50, 20), "conv": torch.randn(4, 3, 5, 5), "none": torch.empty(2, 0, 3)}
    source = cases.write(tmp_path / "src", weights, None)
    monkeypatch.setattr("nautile.checkpoint.convert.job.CHUNK", 140)
    largest, real = [], run.shards.make
    monkeypatch.setattr(run.shards, "make", lambda *work: [largest.append(one.numel()) or one for one in real(*work)])
    convert(source, tmp_path / "dst", BF16, threads=2)
    assert cases.same(cases.read(tmp_path / "dst"), {name: weight.bfloat16() for name, weight in weights.items()})
    assert max(largest) <= 140
    torch.save(weights, tmp_path / "src" / "pytorch_model.bin")
    (tmp_path / "src" / "model.safetensors").unlink()
    convert(source, tmp_path / "again", replace(BF16, allow_pickle=True))
    assert cases.same(cases.read(tmp_path / "again"), cases.read(tmp_path / "dst"))


def test_a_float32_folder_becomes_bf16_except_for_the_routing_bias(tmp_path):
    weights = {name: weight.float() for name, weight in cases.tensors().items()}
    convert(cases.write(tmp_path / "src", weights, cases.CONFIG), tmp_path / "dst", BF16)
    for name, weight in cases.read(tmp_path / "dst").items():
        wide = name.endswith("e_score_correction_bias")
        assert weight.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert weight.equal(weights[name].to(weight.dtype))


def test_a_float32_v32_keeps_its_norms_as_deepseek_publishes_them(tmp_path):
    weights = {name: weight.float() for name, weight in cases.tensors(cases.V32).items()}
    convert(cases.write(tmp_path / "src", weights, cases.V32), tmp_path / "dst", BF16)
    written = cases.read(tmp_path / "dst")
    assert {name: weight.dtype for name, weight in written.items()} == {
        name: weight.dtype for name, weight in cases.tensors(cases.V32).items()
    }


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", torch.float16), ("fp32", torch.float32)])
def test_other_dtypes(tmp_path, dtype, torch_dtype):
    fp8 = cases.quantised(cases.tensors())
    convert(cases.write(tmp_path / "src", fp8, cases.fp8_config()), tmp_path / "dst", Options(dtype))
    written = cases.read(tmp_path / "dst")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    scale = fp8[name + SCALE].repeat_interleave(128, 0).repeat_interleave(128, 1)[:160, :160]
    assert written[name].equal((fp8[name].float() * scale).to(torch_dtype))
    assert written["model.norm.weight"].dtype == torch_dtype
    assert written["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_a_number_that_float16_cannot_hold_is_named(tmp_path):
    weights = {"a.weight": torch.tensor([[1.0, 7e4]]).bfloat16(), "b.weight": torch.tensor([torch.inf]).bfloat16()}
    source = cases.write(tmp_path / "src", weights, {})
    with pytest.raises(UserError, match=r"a\.weight holds 70144"):
        convert(source, tmp_path / "dst", Options("fp16"))
    assert not (tmp_path / "dst").exists()


def test_any_folder_goes_through_with_scalars_integers_and_empty_tensors(tmp_path):
    weights = {
        "scalar": torch.tensor(1.5),
        "count": torch.arange(5),
        "none": torch.empty(0, 3),
        "flat": torch.randn(7),
        "conv": torch.randn(3, 2, 5, 5),
        "yes": torch.tensor([True, False]),
    }
    convert(cases.write(tmp_path / "src", weights, None), tmp_path / "dst", BF16)
    expected = {name: w.bfloat16() if w.is_floating_point() else w for name, w in weights.items()}
    assert cases.same(cases.read(tmp_path / "dst"), expected)
    assert not (tmp_path / "dst" / "config.json").exists()


def test_other_files_are_copied_and_other_weights_are_not(tmp_path):
    source = cases.write(tmp_path / "src", cases.tensors(), cases.CONFIG)
    for name in ("README.md", "modeling.py", "encoding/code.py", "other.gguf", "onnx/model.onnx", ".git/HEAD"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    summary = convert(source, tmp_path / "dst", FP8)
    copied = {str(path.relative_to(tmp_path / "dst")) for path in (tmp_path / "dst").rglob("*") if path.is_file()}
    assert copied == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("README.md", "modeling.py", "encoding/code.py"),
    }
    assert sorted(summary.left_out) == ["onnx/", "other.gguf"]


def test_links_to_nowhere_and_pipes_are_left_out_and_listed(tmp_path):
    source = cases.write(tmp_path / "src", cases.tensors(), cases.CONFIG)
    (source / "README.md").symlink_to(tmp_path / "absent")
    (source / "loop").symlink_to(source / "loop")
    os.mkfifo(source / "pipe")
    (source / "code").mkdir()
    (source / "code" / "a.py").write_text("")
    (source / "code" / "b.py").symlink_to(tmp_path / "absent")
    summary = convert(source, tmp_path / "dst", BF16)
    assert sorted(summary.left_out) == ["README.md", "code/b.py", "loop", "pipe"]
    assert (tmp_path / "dst" / "code" / "a.py").exists()


@pytest.mark.parametrize("options", [BF16, FP8, Options(None, to="deepseek-demo")])
def test_a_file_without_tensors_is_refused(tmp_path, options):
    with pytest.raises(UserError, match="no tensors"):
        convert(cases.write(tmp_path / "src", {}, cases.CONFIG), tmp_path / "dst", options)


def test_pickled_weights_become_safetensors_on_demand(tmp_path):
    weights = {name: weight for name, weight in cases.tensors().items() if "layers.0" in name}
    source = cases.write(tmp_path / "src", weights, cases.CONFIG)
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        convert(source, tmp_path / "dst", BF16)
    convert(source, tmp_path / "dst", replace(BF16, allow_pickle=True))
    assert cases.same(cases.read(tmp_path / "dst"), weights)
    assert (tmp_path / "dst" / "model.safetensors").exists()
    assert not (tmp_path / "dst" / "pytorch_model.bin").exists()


def test_what_is_fp8_already_is_not_quantised_again(tmp_path):
    source = cases.write(tmp_path / "src", cases.quantised(cases.tensors()), cases.fp8_config())
    with pytest.raises(UserError, match="FP8 already") as refused:
        convert(source, tmp_path / "dst", FP8)
    assert "--dtype bf16" in refused.value.cure


def test_weights_without_scales_and_quantisations_of_others_are_named(tmp_path):
    fp8 = cases.quantised(cases.tensors())
    lost = "model.layers.0.self_attn.o_proj.weight" + SCALE
    source = cases.write(tmp_path / "src", {n: w for n, w in fp8.items() if n != lost}, cases.fp8_config())
    with pytest.raises(UserError, match=r"o_proj\.weight is FP8"):
        convert(source, tmp_path / "dst", BF16)
    other = cases.CONFIG | {"quantization_config": {"quant_method": "awq"}}
    source = cases.write(tmp_path / "awq", cases.tensors(), other)
    with pytest.raises(UserError, match="awq"):
        convert(source, tmp_path / "dst", BF16)


def test_nothing_to_quantise_is_said(tmp_path):
    source = cases.write(tmp_path / "src", {"encoder.weight": torch.randn(130, 130)}, {"model_type": "bert"})
    with pytest.raises(UserError, match="no weight to quantise"):
        convert(source, tmp_path / "dst", FP8)


def test_damaged_sources_are_refused_before_anything_is_written(tmp_path):
    source = cases.write(tmp_path / "src", cases.tensors(), cases.CONFIG, 2)
    shard = source / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        convert(source, tmp_path / "dst", BF16)
    shard.unlink()
    with pytest.raises(UserError, match="missing"):
        convert(source, tmp_path / "dst", BF16)
    save_file({"x": torch.ones(1)}, shard)
    with pytest.raises(UserError):
        convert(source, tmp_path / "dst", BF16)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_the_source_may_not_be_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="a file, not a folder"):
        convert(tmp_path / "model.safetensors", tmp_path / "dst", BF16)
