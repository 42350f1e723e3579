"""Tiny random models, built by transformers, that the parity tests compare ours with.

Sizes are odd on purpose, so that no dimension can stand in for another.
"""

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

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

DEEPSEEK_V3 = {
    "vocab_size": 259,
    "hidden_size": 96,
    "intermediate_size": 152,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 36,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 28,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
    "rope_parameters": YARN,
    "rms_norm_eps": 1e-6,
}

VARIANTS = {
    "v3": {},
    "without query latent, eps 1e-5": {"q_lora_rank": None, "rms_norm_eps": 1e-5},
    "plain rope, no groups": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "n_group": 1,
        "topk_group": 1,
    },
    "mscale unlike mscale_all_dim": {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}},
    "weights not normalised": {"norm_topk_prob": False},
    "one expert per token": {"num_experts_per_tok": 1},
    "one shared expert, tied head": {"n_shared_experts": 1, "tie_word_embeddings": True},
}


def deepseek_v3(**changes: object) -> DeepseekV3ForCausalLM:
    """A float32 oracle in eval mode whose correction biases are mostly negative."""
    config = DeepseekV3Config(**{**DEEPSEEK_V3, **changes}, attn_implementation="eager")
    model = DeepseekV3ForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                fan_in = parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.3 / fan_in**0.5))
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3 - 0.8)
    return model
