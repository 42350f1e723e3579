"""Tiny checkpoints with the published names of V3 and V3.2, in FP8 or not, written with the safetensors library."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nautile.checkpoint.fp8 import SCALE, is_quantized, quantize

BLOCK = (128, 128)
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 260,
    "hidden_size": 160,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 144,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "max_position_embeddings": 256,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "torch_dtype": "bfloat16",
}
V32 = CONFIG | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_topk": 8,
}


def tensors(config: dict[str, Any] = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, in the dtypes that DeepSeek publishes before quantising."""
    draw = torch.Generator().manual_seed(seed)
    wide = config["model_type"] == "deepseek_v32"
    made: dict[str, Tensor] = {}

    def weight(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        made[name] = (torch.randn(shape, generator=draw) * 0.2).to(dtype)

    def norm(name: str, size: int) -> None:
        weight(name, size, dtype=torch.float32 if wide else torch.bfloat16)

    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]

    def mlp(name: str, width: int) -> None:
        weight(f"{name}.gate_proj.weight", width, hidden)
        weight(f"{name}.up_proj.weight", width, hidden)
        weight(f"{name}.down_proj.weight", hidden, width)

    weight("model.embed_tokens.weight", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        at = f"model.layers.{layer}"
        norm(f"{at}.input_layernorm.weight", hidden)
        norm(f"{at}.post_attention_layernorm.weight", hidden)
        weight(f"{at}.self_attn.q_a_proj.weight", config["q_lora_rank"], hidden)
        norm(f"{at}.self_attn.q_a_layernorm.weight", config["q_lora_rank"])
        weight(f"{at}.self_attn.q_b_proj.weight", heads * query, config["q_lora_rank"])
        latent = config["kv_lora_rank"]
        weight(f"{at}.self_attn.kv_a_proj_with_mqa.weight", latent + config["qk_rope_head_dim"], hidden)
        norm(f"{at}.self_attn.kv_a_layernorm.weight", latent)
        both = config["qk_nope_head_dim"] + config["v_head_dim"]
        weight(f"{at}.self_attn.kv_b_proj.weight", heads * both, latent)
        weight(f"{at}.self_attn.o_proj.weight", hidden, heads * config["v_head_dim"])
        if wide:
            keys = config["index_head_dim"]
            weight(f"{at}.self_attn.indexer.wq_b.weight", config["index_n_heads"] * keys, config["q_lora_rank"])
            weight(f"{at}.self_attn.indexer.wk.weight", keys, hidden)
            norm(f"{at}.self_attn.indexer.k_norm.weight", keys)
            norm(f"{at}.self_attn.indexer.k_norm.bias", keys)
            weight(f"{at}.self_attn.indexer.weights_proj.weight", config["index_n_heads"], hidden)
        if layer < config["first_k_dense_replace"]:
            mlp(f"{at}.mlp", config["intermediate_size"])
        else:
            weight(f"{at}.mlp.gate.weight", config["n_routed_experts"], hidden)
            made[f"{at}.mlp.gate.e_score_correction_bias"] = 5 + torch.rand(config["n_routed_experts"], generator=draw)
            for expert in range(config["n_routed_experts"]):
                mlp(f"{at}.mlp.experts.{expert}", config["moe_intermediate_size"])
            mlp(f"{at}.mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])
        if layer >= config["num_hidden_layers"]:
            for name in ("enorm", "hnorm", "shared_head.norm"):
                norm(f"{at}.{name}.weight", hidden)
            weight(f"{at}.eh_proj.weight", hidden, 2 * hidden)
            made[f"{at}.embed_tokens.weight"] = made["model.embed_tokens.weight"].clone()
            weight(f"{at}.shared_head.head.weight", config["vocab_size"], hidden)
    norm("model.norm.weight", hidden)
    weight("lm_head.weight", config["vocab_size"], hidden)
    return made


def quantised(weights: dict[str, Tensor], ue8m0: bool = False) -> dict[str, Tensor]:
    """The same checkpoint in FP8."""
    made: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if is_quantized(name, tuple(weight.shape)):
            made[name], made[name + SCALE] = quantize(weight, BLOCK, "ue8m0" if ue8m0 else None)
        else:
            made[name] = weight
    return made


def fp8_config(config: dict[str, Any] = CONFIG, ue8m0: bool = False) -> dict[str, Any]:
    """config.json of `quantised`, spelled as DeepSeek does."""
    entry = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    return config | {"quantization_config": entry | ({"scale_fmt": "ue8m0"} if ue8m0 else {})}


def write(folder: Path, weights: dict[str, Tensor], config: dict[str, Any] | None, files: int = 1) -> Path:
    """A published folder. With several files, scales lie apart from their weights, as may happen in real ones."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    if files == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = sorted(weights)
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = names[i::files]
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal in names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        x.dtype == other[name].dtype and x.shape == other[name].shape and bits(x).equal(bits(other[name]))
        for name, x in one.items()
    )


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
