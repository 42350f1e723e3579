"""Tiny random models, built from transformers' classes, that the parity tests compare ours with.

Sizes are odd on purpose, so that no dimension can stand in for another. A case is an oracle and how its folder is
written, in the published spelling of config.json or in transformers 5's. Where transformers has no class, or ignores a
field, the oracle is put together from classes that do what the field asks for.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

Spelling = Literal["published", "transformers"]
SPELLINGS: tuple[Spelling, ...] = ("published", "transformers")

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

DECODER = {
    "vocab_size": 259,
    "hidden_size": 96,
    "intermediate_size": 152,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
}
LATENT = {
    "q_lora_rank": 36,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 28,
    "rope_parameters": YARN,
}
GROUPS = {"n_group": 4, "topk_group": 2}
DEEPSEEK_V2 = {**DECODER, **EXPERTS, **LATENT, "topk_method": "greedy", "norm_topk_prob": False}
DEEPSEEK_V3 = {**DECODER, **EXPERTS, **LATENT, **GROUPS, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
LLAMA = {**DECODER, "rope_parameters": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN2 = {**DECODER, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


@dataclass(frozen=True)
class Case:
    """One checkpoint to compare."""

    family: str
    """Its `model_type`."""
    make: Callable[[], nn.Module]
    """The oracle, in float32 and eval mode."""
    published: dict[str, Any] = field(default_factory=dict)
    """Fields of the published config.json that transformers does not know."""
    readable: bool = True
    """Whether transformers can read the folder back and means the same."""

    def write(self, oracle: nn.Module, folder: Path, spelling: Spelling = "transformers") -> None:
        """Write the oracle as a model folder."""
        save(oracle, folder)
        config = json.loads((folder / "config.json").read_text())
        config = {**(published_spelling(config) if spelling == "published" else config), **self.published}
        config["model_type"] = self.family
        (folder / "config.json").write_text(json.dumps(config))


def published_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 in the words of the published files."""
    rope = dict(config.pop("rope_parameters"))
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype", "float32")
    if "kv_lora_rank" in config:  # transformers writes the rotated dimensions there
        del config["head_dim"]
    return {**config, "rope_theta": theta, "rope_scaling": scaling}


def save(oracle: nn.Module, folder: Path) -> None:
    """`save_pretrained`, and the same layout by hand where the model is put together from two families."""
    if not isinstance(oracle, transformers.LlamaForCausalLM):
        oracle.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    oracle.config.save_pretrained(folder)
    tensors = {}
    for name, tensor in oracle.state_dict().items():
        if name.endswith(".experts.gate_up_proj"):
            for e, gate_up in enumerate(tensor):
                for part, weight in zip(("gate_proj", "up_proj"), gate_up.chunk(2), strict=True):
                    tensors[name.replace("gate_up_proj", f"{e}.{part}.weight")] = weight.clone()
        elif name.endswith(".experts.down_proj"):
            for e, weight in enumerate(tensor):
                tensors[name.replace("down_proj", f"{e}.down_proj.weight")] = weight.clone()
        elif not (oracle.config.tie_word_embeddings and name == "lm_head.weight"):
            tensors[name] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def randomise(model: nn.Module) -> Any:
    """Random weights that say something: norms near 1, biases of some size, correction biases mostly negative."""
    generator = torch.Generator().manual_seed(20)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and not name.endswith("bias"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise * (0.3 if name.endswith("bias") else 1.3 / parameter.shape[-1] ** 0.5))
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3 - 0.8)
    return model


def build(family: str, base: dict[str, Any], **changes: Any) -> Any:
    """An oracle of one of transformers' own families."""
    config = getattr(transformers, f"{family}Config")(**{**base, **changes}, attn_implementation="eager")
    return randomise(getattr(transformers, f"{family}ForCausalLM")(config).float().eval())


def deepseek_v3(**changes: Any) -> Any:
    """A DeepSeek-V3 oracle."""
    return build("DeepseekV3", DEEPSEEK_V3, **changes)


def deepseek_v2(**changes: Any) -> Any:
    """A DeepSeek-V2 oracle."""
    return build("DeepseekV2", DEEPSEEK_V2, **changes)


def deepseek_moe() -> Any:
    """DeepSeekMoE-16B, for which there is no class: Llama's attention, DeepSeek-V2's mixture."""
    model = build("Llama", {**QWEN2, "num_attention_heads": 4, "num_key_value_heads": 4})
    moe = transformers.DeepseekV2Config(**{**DEEPSEEK_V2, "first_k_dense_replace": 1})
    for layer in model.model.layers[1:]:
        layer.mlp = DeepseekV2Moe(moe)
    return randomise(model.float().eval())


def vl2_language_model() -> Any:
    """DeepSeek-V2 with V3's router, as in the 27B VL2, which transformers cannot run."""
    model = deepseek_v2()
    gates = transformers.DeepseekV3Config(**{**DEEPSEEK_V3, "routed_scaling_factor": 2.5})
    for layer in model.model.layers[2:]:
        layer.mlp.gate = DeepseekV3TopkRouter(gates)
    return randomise(model.float().eval())


class NormalisingGate(nn.Module):
    """Does what `norm_topk_prob` asks for and transformers' DeepseekV2 ignores."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.weight, self.inner = gate.weight, [gate]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, indices = self.inner[0](x)
        return logits, self.inner[0].routed_scaling_factor * weights / weights.sum(-1, keepdim=True), indices


def normalising_v2() -> Any:
    """DeepSeek-V2 with `norm_topk_prob`."""
    model = deepseek_v2(norm_topk_prob=True, routed_scaling_factor=3.0)
    for layer in model.model.layers[2:]:
        layer.mlp.gate = NormalisingGate(layer.mlp.gate)
    return model


def v2(**changes: Any) -> Case:
    return Case("deepseek_v2", lambda: deepseek_v2(**changes))


def v3(**changes: Any) -> Case:
    return Case("deepseek_v3", lambda: deepseek_v3(**changes))


def llama(**changes: Any) -> Case:
    return Case("llama", lambda: build("Llama", LLAMA, **changes))


def qwen2(**changes: Any) -> Case:
    return Case("qwen2", lambda: build("Qwen2", QWEN2, **changes))


YARN_PLAIN = {key: value for key, value in YARN.items() if "mscale" not in key}
YARN_LITE = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
VL2_FIELDS = {
    **GROUPS,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}

CASES: dict[str, Case] = {
    "v2-lite": v2(q_lora_rank=None, rope_parameters=YARN_LITE),
    "v2": v2(topk_method="group_limited_greedy", **GROUPS, routed_scaling_factor=16.0, rope_parameters=YARN_LITE),
    "v2, weights normalised": Case("deepseek_v2", normalising_v2, readable=False),
    "vl2's language model": Case("deepseek_v2", vl2_language_model, VL2_FIELDS, readable=False),
    "v3": v3(),
    "v3 without query latent, eps 1e-5": v3(q_lora_rank=None, rms_norm_eps=1e-5),
    "v3, plain rope, no groups": v3(
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, n_group=1, topk_group=1
    ),
    "v3, mscale unlike mscale_all_dim": v3(rope_parameters={**YARN, "mscale": 0.707}),
    "v3, weights not normalised": v3(norm_topk_prob=False),
    "v3, one expert per token": v3(num_experts_per_tok=1),
    "v3, one shared expert, tied head": v3(n_shared_experts=1, tie_word_embeddings=True),
    "moe-16b": Case(
        "deepseek",
        deepseek_moe,
        {**EXPERTS, "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax"},
        readable=False,
    ),
    "coder, one key head per query head": llama(),
    "coder, grouped": llama(num_attention_heads=6, num_key_value_heads=2),
    "r1-distill-llama": llama(num_attention_heads=6, num_key_value_heads=3, rope_parameters=LLAMA3, rms_norm_eps=1e-5),
    "llama, biases, own head_dim": llama(
        num_attention_heads=4, num_key_value_heads=1, head_dim=20, attention_bias=True
    ),
    "llama, yarn": llama(rope_parameters=YARN_PLAIN),
    "llama, yarn with both mscales": llama(rope_parameters=YARN),
    "qwen2, yarn with one mscale": qwen2(rope_parameters={**YARN_PLAIN, "mscale": 0.707}),
    "qwen2, yarn with its own factor, not rounded": qwen2(
        rope_parameters={**YARN_PLAIN, "attention_factor": 2.0, "truncate": False}
    ),
    "r1-distill-qwen": qwen2(num_attention_heads=6, num_key_value_heads=2),
    "qwen2, tied head": qwen2(num_key_value_heads=1, tie_word_embeddings=True),
}
