"""A block-quantised folder is its dequantised twin, exactly: partial blocks, scales in another shard, experts."""

import json
from pathlib import Path

import pytest
import torch
from families import deepseek_v3
from safetensors.torch import load_file, save_file
from torch import Tensor

import nautile

BLOCK = 128
# Rows that no block divides: 576 = 512 + 64 as published, and 144, which transformers' grid of blocks gets wrong.
SIZES = {"576 rows": {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, "144 rows": {"kv_lora_rank": 132}}


def published_scales(weight: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """e4m3 codes and float32 scales, block by block: an implementation as naive as can be."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale[i, j] = weight[place].abs().max() / 448
            if ue8m0:
                scale[i, j] = 2.0 ** torch.ceil(torch.log2(scale[i, j]))
            codes[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


def dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    rows, columns = codes.shape
    spread = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return codes.float() * spread


def is_projection(name: str) -> bool:
    return "_proj" in name and "eh_proj" not in name


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_an_fp8_folder_equals_its_dequantised_twin(size: str, ue8m0: bool, tmp_path: Path) -> None:
    oracle = deepseek_v3(hidden_size=200, moe_intermediate_size=136, **SIZES[size])
    oracle.save_pretrained(tmp_path / "twin")
    tensors = load_file(tmp_path / "twin" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape[0] == int(size.split()[0])
    config = json.loads((tmp_path / "twin" / "config.json").read_text())
    weights, scales, twin = {}, {}, {}
    for name, tensor in tensors.items():
        weights[name] = twin[name] = tensor
        if is_projection(name):
            weights[name], scales[f"{name}_scale_inv"] = published_scales(tensor, ue8m0)
            twin[name] = dequantised(weights[name], scales[f"{name}_scale_inv"])
    (tmp_path / "fp8").mkdir()
    save_file(weights, tmp_path / "fp8" / "weights.safetensors")
    save_file(scales, tmp_path / "fp8" / "scales.safetensors")
    files = dict.fromkeys(weights, "weights.safetensors") | dict.fromkeys(scales, "scales.safetensors")
    (tmp_path / "fp8" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    quantised = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    config["quantization_config"] = (
        quantised | {"activation_scheme": "dynamic"} | ({"scale_fmt": "ue8m0"} if ue8m0 else {})
    )
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    save_file(twin, tmp_path / "twin" / "model.safetensors", {"format": "pt"})

    from_fp8, from_twin = nautile.load(tmp_path / "fp8"), nautile.load(tmp_path / "twin")
    for (name, a), (_, b) in zip(from_fp8.state_dict().items(), from_twin.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    tokens = torch.randint(0, 259, (2, 19), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert torch.equal(from_fp8(tokens), from_twin(tokens))
        twin_oracle = type(oracle).from_pretrained(tmp_path / "twin", attn_implementation="eager", dtype=torch.float32)
        torch.testing.assert_close(from_fp8(tokens), twin_oracle(tokens).logits, atol=2e-4, rtol=2e-4)
    in_bfloat16 = nautile.load(tmp_path / "fp8", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(in_bfloat16[n], p.to(in_bfloat16[n].dtype)) for n, p in from_twin.state_dict().items())


def test_the_scale_grid_does_not_say_how_large_a_block_is(tmp_path: Path) -> None:
    """144 rows and two scales: blocks of 128 and 16 rows, not two of 72."""
    test_an_fp8_folder_equals_its_dequantised_twin("144 rows", False, tmp_path)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    codes = load_file(tmp_path / "fp8" / "weights.safetensors")[name].float()
    scale = load_file(tmp_path / "fp8" / "scales.safetensors")[f"{name}_scale_inv"]
    halves = codes * scale.repeat_interleave(72, 0).repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]
    assert not torch.equal(nautile.load(tmp_path / "fp8").model.layers[0].self_attn.kv_a_proj_with_mqa.weight, halves)
