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
_SCALING = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
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
    grouped = _topk_method(config) != "greedy"  # which never looks at groups; the demo does whenever there are some
    args["n_expert_groups"] = (config.get("n_group") or 1) if grouped else 1
    args["n_limited_groups"] = (config.get("topk_group") or 1) if grouped else 1
    args["score_func"] = _scoring(config)
    args["route_scale"] = float(_or(config.get("routed_scaling_factor"), 1.0))
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
    problem = next(_malformed(config), None)
    if problem:
        raise UserError(
            f"--to deepseek-demo: {problem}",
            f"{FILE} is written from config.json",
            "copy the model's published config.json again, or correct the value",
        )
    problem = next(_fixed(config), None)
    if problem:
        raise UserError(
            f"--to deepseek-demo: {problem}",
            "the demo has no setting for it and would compute something else",
            "run the model with nautile or transformers instead",
        )


def _malformed(config: Mapping[str, Any]) -> Iterator[str]:
    """Fields that are missing or of another type than the demo's."""
    sizes = (*SIZES.values(), *(INDEXER if config["model_type"] == "deepseek_v32" else ()))
    missing = [key for key in sizes if config.get(key) is None]
    if missing:
        yield f"config.json lacks {', '.join(missing)}"
    for key in (*sizes, "n_group", "topk_group", "q_lora_rank"):
        if config.get(key) is not None and (type(config[key]) is not int or config[key] < 0):
            yield f"{key} is {config[key]!r:.80}, not a number of something"
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        yield f"rope_scaling is {scaling!r:.80}"
        return
    if "factor" in scaling and _scales_as_the_demo(scaling) and not scaling.get("original_max_position_embeddings"):
        yield "rope_scaling lacks original_max_position_embeddings"
    named = {key: config.get(key) for key in ("routed_scaling_factor", "rope_theta")}
    named |= {key: scaling.get(key) for key in ("rope_theta", *_SCALING) if key in scaling}
    for key, value in named.items():
        if value is not None and type(value) not in (int, float):
            yield f"{key} is {value!r:.80}, not a number"


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
    if not _scales_as_the_demo(scaling):
        yield f"its rotary embedding is scaled by {scaling.get('type', scaling.get('rope_type'))}"
    if "factor" in scaling and (not scaling.get("mscale") or scaling["mscale"] != scaling.get("mscale_all_dim")):
        yield "mscale and mscale_all_dim of its rope_scaling are not the same number"


def needs_bias_patch(config: Mapping[str, Any]) -> bool:
    """Whether the model has a routing bias that the demo, as published, would not read."""
    return _topk_method(config) == "noaux_tc" and config["hidden_size"] != BIASED_WIDTH


def _topk_method(config: Mapping[str, Any]) -> str:
    return config.get("topk_method") or ("noaux_tc" if _scoring(config) == "sigmoid" else "greedy")


def _scoring(config: Mapping[str, Any]) -> str:
    return config.get("scoring_func") or ("softmax" if config["model_type"] == "deepseek_v2" else "sigmoid")


def _scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _scales_as_the_demo(scaling: Mapping[str, Any]) -> bool:
    return scaling.get("type", scaling.get("rope_type", "default")) in ("default", "yarn")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without YaRN the demo's formulas give plain rotary embeddings at factor 1."""
    scaling = _scaling(config)
    args = {"rope_theta": float(_or(config.get("rope_theta"), _or(scaling.get("rope_theta"), 10000.0)))}
    if "factor" not in scaling:
        return args | {"rope_factor": 1.0}
    return args | {
        "rope_factor": scaling["factor"],
        "original_seq_len": scaling["original_max_position_embeddings"],
        "beta_fast": scaling.get("beta_fast", 32),
        "beta_slow": scaling.get("beta_slow", 1),
        "mscale": scaling.get("mscale", 1.0),
    }


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
