"""Presets against config.json as the repositories publish it, with the fields that only other programs read."""

import dataclasses

import pytest

from nautile.models.family import config_from_hf
from nautile.models.presets import PRESETS

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}


def remote_code(stem: str) -> dict:
    """What points transformers to the Python files of the repository, which nautile never runs."""
    classes = {"AutoConfig": f"{stem}Config", "AutoModel": f"{stem}Model", "AutoModelForCausalLM": f"{stem}ForCausalLM"}
    return {
        "architectures": [f"{stem}ForCausalLM"],
        "auto_map": {k: f"modeling_deepseek.{v}" for k, v in classes.items()},
    }


V2 = {
    **COMMON,
    **remote_code("DeepseekV2"),
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "transformers_version": "4.33.1",
    "v_head_dim": 128,
    "vocab_size": 102400,
}

PUBLISHED = {
    "v2-236b": V2,
    "v2-lite": V2
    | {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1}
    | {"n_routed_experts": 64, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 27}
    | {"q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_method": "greedy"},
    "v3-671b": {
        **COMMON,
        **remote_code("DeepseekV3"),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "transformers_version": "4.46.3",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "moe-16b": {
        **COMMON,
        **remote_code("Deepseek"),
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "max_position_embeddings": 4096,
        "model_type": "deepseek",
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 28,
        "num_key_value_heads": 16,
        "rope_scaling": None,
        "scoring_func": "softmax",
        "transformers_version": "4.36.0",
        "vocab_size": 102400,
    },
    "r1-distill-qwen-1.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "initializer_range": 0.02,
        "intermediate_size": 8960,
        "max_position_embeddings": 131072,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
PUBLISHED["v32-685b"] = (
    PUBLISHED["v3-671b"]
    | {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
    | {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
    | {"quantization_config": {**PUBLISHED["v3-671b"]["quantization_config"], "scale_fmt": "ue8m0"}}
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_the_preset(name):
    assert config_from_hf(PUBLISHED[name]) == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_own_config_json(name):
    assert config_from_hf(PRESETS[name].to_hf()) == PRESETS[name]


def test_v25_and_coder_v2_differ_from_v2_in_their_yarn_factors_alone():
    v25 = config_from_hf(V2 | {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}})
    changed = {f.name for f in dataclasses.fields(v25) if getattr(v25, f.name) != getattr(PRESETS["v2-236b"], f.name)}
    assert changed == {"rope_scaling"}


def test_a_field_that_matters_is_compared():
    """Negative control of the equalities above."""
    assert config_from_hf(PUBLISHED["v3-671b"] | {"n_shared_experts": 2}) != PRESETS["v3-671b"]
