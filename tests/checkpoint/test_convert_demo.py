"""Files for DeepSeek's demo: names, cuts and configuration written out by hand from its convert.py and model.py."""

import json
import re

import convert_cases as cases
import pytest
import torch
from safetensors.torch import load_file

from nautile.checkpoint.convert.options import Options
from nautile.checkpoint.convert.run import convert
from nautile.checkpoint.fp8 import quantize
from nautile.core.errors import UserError


def demo(n=1, dtype=None):
    return Options(dtype, to="deepseek-demo", model_parallel=n)


def ranks(folder, n):
    assert len(list(folder.glob("*.safetensors"))) == n
    return [load_file(folder / f"model{i}-mp{n}.safetensors") for i in range(n)]


LAYER_1 = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.wq_a.scale": "self_attn.q_a_proj.weight_scale_inv",
    "attn.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.wkv_a.scale": "self_attn.kv_a_proj_with_mqa.weight_scale_inv",
    "attn.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
}
"""What every process holds whole."""
ROWS = {
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv_b": "self_attn.kv_b_proj",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
}
COLUMNS = {"attn.wo": "self_attn.o_proj", "ffn.shared_experts.w2": "mlp.shared_experts.down_proj"}
EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def expected(fp8, rank, n, v32):
    """All tensors of layer 1, and those outside of the layers, of one process."""
    at = "model.layers.1."
    made = {f"layers.1.{ours}": fp8[at + theirs] for ours, theirs in LAYER_1.items()}
    for ending, published in (("weight", "weight"), ("scale", "weight_scale_inv")):
        for dim, names in ((0, ROWS), (1, COLUMNS)):
            for ours, theirs in names.items():
                made[f"layers.1.{ours}.{ending}"] = fp8[f"{at}{theirs}.{published}"].chunk(n, dim)[rank]
        for expert in range(4 * rank // n, 4 * (rank + 1) // n):
            for ours, theirs in EXPERT.items():
                made[f"layers.1.ffn.experts.{expert}.{ours}.{ending}"] = fp8[
                    f"{at}mlp.experts.{expert}.{theirs}.{published}"
                ]
    if v32:
        for name in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"):
            made[f"layers.1.attn.indexer.{name}"] = fp8[f"{at}self_attn.indexer.{name}"]
        for name in ("wq_b", "wk"):
            made[f"layers.1.attn.indexer.{name}.scale"] = fp8[f"{at}self_attn.indexer.{name}.weight_scale_inv"]
    made["embed.weight"] = fp8["model.embed_tokens.weight"].chunk(n)[rank]
    made["head.weight"] = fp8["lm_head.weight"].chunk(n)[rank]
    made["norm.weight"] = fp8["model.norm.weight"]
    return made


@pytest.mark.parametrize(("config", "ue8m0"), [(cases.CONFIG, False), (cases.V32, True)], ids=["v3", "v32"])
@pytest.mark.parametrize("n", [1, 2])
def test_names_and_cuts(tmp_path, config, ue8m0, n):
    fp8 = cases.quantised(cases.tensors(config), ue8m0)
    source = cases.write(tmp_path / "src", fp8, cases.fp8_config(config, ue8m0), 3)
    summary = convert(source, tmp_path / "dst", demo(n))
    for rank, tensors in enumerate(ranks(tmp_path / "dst", n)):
        found = {name: tensor for name, tensor in tensors.items() if not name.startswith("layers.0.")}
        assert cases.same(found, expected(fp8, rank, n, ue8m0))
        assert tensors["layers.0.ffn.w2.scale"].equal(
            fp8["model.layers.0.mlp.down_proj.weight_scale_inv"].chunk(n, 1)[rank]
        )
    mtp = sum(name.startswith("model.layers.2.") for name in fp8)
    reason = "multi-token-prediction modules have no place in the demo"
    assert f"{mtp} tensors are left out: {reason}" in summary.notes


def test_configuration_and_tokenizer(tmp_path):
    source = cases.write(tmp_path / "src", cases.quantised(cases.tensors(cases.V32)), cases.fp8_config(cases.V32, True))
    (source / "README.md").write_text("a card")
    convert(source, tmp_path / "dst", demo())
    assert json.loads((tmp_path / "dst" / "model_args.json").read_text()) == {
        "vocab_size": 260,
        "dim": 160,
        "inter_dim": 512,
        "moe_inter_dim": 256,
        "n_layers": 2,
        "n_dense_layers": 1,
        "n_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "n_activated_experts": 2,
        "n_expert_groups": 2,
        "n_limited_groups": 1,
        "score_func": "sigmoid",
        "route_scale": 2.5,
        "q_lora_rank": 144,
        "kv_lora_rank": 96,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "rope_theta": 10000.0,
        "rope_factor": 40,
        "original_seq_len": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "index_n_heads": 4,
        "index_head_dim": 128,
        "index_topk": 8,
        "dtype": "fp8",
        "scale_fmt": "ue8m0",
    }
    assert {path.name for path in (tmp_path / "dst").iterdir()} == {
        *("model0-mp1.safetensors", "model_args.json", "tokenizer.json", "tokenizer_config.json")
    }


def test_cut_and_cast_go_together(tmp_path):
    weights = cases.tensors()
    source = cases.write(tmp_path / "src", weights, cases.CONFIG)
    convert(source, tmp_path / "fp8", demo(2, "fp8"))
    name = "layers.1.ffn.shared_experts.w2"
    for rank, tensors in enumerate(ranks(tmp_path / "fp8", 2)):
        part = weights["model.layers.1.mlp.shared_experts.down_proj.weight"].chunk(2, 1)[rank]
        weight, scale = quantize(part)
        assert tensors[f"{name}.weight"].float().equal(weight.float())
        assert tensors[f"{name}.scale"].equal(scale)
    assert json.loads((tmp_path / "fp8" / "model_args.json").read_text())["dtype"] == "fp8"
    fp8 = cases.write(tmp_path / "src8", cases.quantised(weights), cases.fp8_config())
    convert(fp8, tmp_path / "bf16", demo(4, "bf16"))  # 64 columns each: no scales, so no block is in the way
    assert json.loads((tmp_path / "bf16" / "model_args.json").read_text())["dtype"] == "bf16"
    for tensors in ranks(tmp_path / "bf16", 4):
        assert tensors[f"{name}.weight"].shape == (160, 128)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.float32}


def test_v2_without_query_compression(tmp_path):
    config = cases.CONFIG | {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
    }
    weights = {n: w for n, w in cases.tensors().items() if ".q_" not in n and "e_score" not in n}
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.randn(512, 160).bfloat16()
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    summary = convert(cases.write(tmp_path / "src", weights, config), tmp_path / "dst", demo(2))
    (first, second) = ranks(tmp_path / "dst", 2)
    whole = torch.cat([first["layers.0.attn.wq.weight"], second["layers.0.attn.wq.weight"]])
    assert whole.equal(weights["model.layers.0.self_attn.q_proj.weight"])
    args = json.loads((tmp_path / "dst" / "model_args.json").read_text())
    assert (args["q_lora_rank"], args["score_func"]) == (0, "softmax")
    # config.json has two groups, which "greedy" does not look at; the demo's gate does whenever there are several.
    assert (args["n_expert_groups"], args["n_limited_groups"]) == (1, 1)
    assert not any("gate.bias" in note for note in summary.notes)
    frequencies = "the demo computes the rotary frequencies itself"
    assert f"2 tensors are left out: {frequencies}" in summary.notes
    del weights["model.layers.1.self_attn.rotary_emb.inv_freq"]
    summary = convert(cases.write(tmp_path / "one", weights, config), tmp_path / "one-demo", demo())
    assert f"1 tensor is left out: {frequencies}" in summary.notes


@pytest.mark.parametrize(
    ("n", "dtype", "what", "good"),
    [
        (3, None, "4 attention heads cannot be shared by 3", "--model-parallel 1 or 2"),
        (4, None, "cut into parts of 64, across FP8 blocks of 128", "--model-parallel 1 or 2"),
        (8, "bf16", "4 attention heads cannot be shared by 8", "--model-parallel 1 or 2 or 4"),
    ],
)
def test_processes_that_do_not_divide_the_model(tmp_path, n, dtype, what, good):
    source = cases.write(tmp_path / "src", cases.quantised(cases.tensors()), cases.fp8_config())
    with pytest.raises(UserError, match=what) as refused:
        convert(source, tmp_path / "dst", demo(n, dtype))
    assert refused.value.cure == good


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"rope_scaling": cases.CONFIG["rope_scaling"] | {"mscale_all_dim": 0.707}}, "mscale"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "scaled by linear"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', not a number"),
        ({"n_routed_experts": None}, "config.json lacks n_routed_experts"),
        ({"n_routed_experts": 3}, r"experts\.3\..* is of expert 3, config.json has 3"),
        ({"n_group": [2]}, r"n_group is \[2\]"),
        ({"routed_scaling_factor": "much"}, "routed_scaling_factor is 'much', not a number"),
        ({"rope_theta": {}}, "rope_theta is {}, not a number"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "lacks original_max_position_embeddings"),
        ({"rope_scaling": cases.CONFIG["rope_scaling"] | {"mscale": "1"}}, "mscale is '1', not a number"),
    ],
)
def test_what_the_demo_would_run_wrongly_is_refused(tmp_path, change, what):
    source = cases.write(tmp_path / "src", cases.tensors(), cases.CONFIG | change)
    with pytest.raises(UserError, match=what):
        convert(source, tmp_path / "dst", demo())


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_a_proj.bias",
        "model.layers.x.self_attn.q_a_proj.weight",
        "model.layers",
        "model.layers.1.mlp.experts.one.up_proj.weight",
        "model.layers.1.mlp.experts.up_proj.weight",
        "model.layers.1.mlp.experts.1.more.up_proj.weight",
        "weight",
        "",
    ],
)
def test_parts_that_the_demo_does_not_know_are_named(tmp_path, name):
    weights = cases.tensors() | {name: torch.ones(144)}
    with pytest.raises(UserError, match=rf"^{re.escape(name)} has no place"):
        convert(cases.write(tmp_path / "src", weights, cases.CONFIG), tmp_path / "dst", demo())


def test_a_matrix_that_is_none_is_named(tmp_path):
    weights = cases.tensors() | {"lm_head.weight": torch.ones(144)}
    with pytest.raises(UserError, match=r"lm_head\.weight is \[144\], not a matrix"):
        convert(cases.write(tmp_path / "src", weights, cases.CONFIG), tmp_path / "dst", demo(2))
