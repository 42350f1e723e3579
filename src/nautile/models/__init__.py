"""Model families: one folder each, wired from `nautile.layers`. `io` knows them by this table."""

FAMILIES: dict[str, tuple[str, str]] = {
    "deepseek": ("nautile.models.deepseek_moe", "Deepseek"),
    "deepseek_v2": ("nautile.models.deepseek_v2", "DeepseekV2"),
    "deepseek_v3": ("nautile.models.deepseek_v3", "DeepseekV3"),
    "deepseek_v32": ("nautile.models.deepseek_v32", "DeepseekV32"),
    "llama": ("nautile.models.llama", "Llama"),
    "qwen2": ("nautile.models.qwen2", "Qwen2"),
}
"""`model_type` of a config.json → package, and the stem of its class names.

The package has ``config.<Stem>Config``, ``model.<Stem>ForCausalLM`` and ``checkpoint.layout(config)``.
"""
