"""``ModelArgs`` of DeepSeek's demo, written from config.json.

The demo fixes what config.json may say otherwise: such a model is refused, since the demo would run it wrongly.

Source: ``inference/model.py`` and the JSON files beside it, of DeepSeek-V3 and of DeepSeek-V3.2-Exp.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from nautile.core.errors import UserError
from nautile.core.nearest import suggestion

FILE = "model_args.json"
FAMILIES = ("deepseek_v2", "deepseek_v3", "deepseek_v32")
SIZES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
INDEXER = ("index_n_heads", "index_head_dim", "index_topk")
BIASED_WIDTH = 7168
"""The one hidden size at which the demo reads the routing bias; it tells V3 from V2 by it."""


def model_args(config: Mapping[str, Any], fp8: bool, scale_fmt: str | None) -> dict[str, Any]:
    """The demo's configuration.

    Args:
        config: The published config.json.
        fp8: Whether the written weights are FP8.
        scale_fmt: Format of their scales.

    Raises:
        UserError: The demo cannot run this model.
    """
    _check(config)
    args = {ours: config[theirs] for ours, theirs in SIZES.items()}
    args["n_expert_groups"] = config.get("n_group") or 1
    args["n_limited_groups"] = config.get("topk_group") or 1
    args["score_func"] = _scoring(config)
    args["route_scale"] = float(config.get("routed_scaling_factor", 1.0))
    args["q_lora_rank"] = config.get("q_lora_rank") or 0
    args |= _rope(config)
    if config["model_type"] == "deepseek_v32":
        args |= {key: config[key] for key in INDEXER}
    args["dtype"] = "fp8" if fp8 else "bf16"
    return args | ({"scale_fmt": scale_fmt} if fp8 and scale_fmt else {})


def _check(config: Mapping[str, Any]) -> None:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"--to deepseek-demo of model_type {family!r}",
            "DeepSeek's demo runs " + ", ".join(FAMILIES),
            suggestion(str(family), FAMILIES, "families"),
        )
    missing = [key for key in (*SIZES.values(), *(INDEXER if family == "deepseek_v32" else ())) if key not in config]
    problem = f"config.json lacks {', '.join(missing)}" if missing else next(_fixed(config), None)
    if problem:
        raise UserError(
            f"--to deepseek-demo: {problem}",
            "the demo has no setting for it and would compute something else",
            "run the model with nautile or transformers instead",
        )


def _fixed(config: Mapping[str, Any]) -> Iterator[str]:
    """What the model asks for and the demo cannot do."""
    for key, value in (("rms_norm_eps", 1e-6), ("hidden_act", "silu"), ("moe_layer_freq", 1)):
        if config.get(key, value) != value:
            yield f"{key} is {config[key]}, the demo's is {value}"
    for key in ("attention_bias", "tie_word_embeddings"):
        if config.get(key):
            yield f"{key} is set"
    normalised = _scoring(config) == "sigmoid"
    if bool(config.get("norm_topk_prob", normalised)) != normalised:
        yield f"norm_topk_prob is {config['norm_topk_prob']} with scores by {_scoring(config)}"
    scaling = _scaling(config)
    if scaling.get("type", scaling.get("rope_type", "default")) not in ("default", "yarn"):
        yield f"its rotary embedding is scaled by {scaling.get('type', scaling.get('rope_type'))}"
    if "factor" in scaling and (not scaling.get("mscale") or scaling["mscale"] != scaling.get("mscale_all_dim")):
        yield "mscale and mscale_all_dim of its rope_scaling are not the same number"


def needs_bias_patch(config: Mapping[str, Any]) -> bool:
    """Whether the model has a routing bias that the demo, as published, would not read."""
    return config.get("topk_method", "noaux_tc" if _scoring(config) == "sigmoid" else None) == "noaux_tc" and (
        config["hidden_size"] != BIASED_WIDTH
    )


def _scoring(config: Mapping[str, Any]) -> str:
    return config.get("scoring_func", "softmax" if config.get("model_type") == "deepseek_v2" else "sigmoid")


def _scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without YaRN the demo's formulas give plain rotary embeddings at factor 1."""
    scaling = _scaling(config)
    args = {"rope_theta": float(config.get("rope_theta", scaling.get("rope_theta", 10000.0)))}
    if "factor" not in scaling:
        return args | {"rope_factor": 1.0}
    return args | {
        "rope_factor": scaling["factor"],
        "original_seq_len": scaling["original_max_position_embeddings"],
        "beta_fast": scaling.get("beta_fast", 32),
        "beta_slow": scaling.get("beta_slow", 1),
        "mscale": scaling.get("mscale", 1.0),
    }
