"""Shapes of published models that nautile can count but has no preset for."""

from nautile.models.accounting.shape import Experts, GroupedAttention, LatentAttention, Shape

_V2_HEAD = {"nope": 128, "rope": 64, "value": 128}

DEEPSEEK_67B = Shape(
    name="DeepSeek 67B",
    vocab=102400,
    hidden=8192,
    layers=95,
    heads=64,
    dense_width=22016,
    attention=GroupedAttention(kv_heads=8, head_dim=128),
)
"""The dense predecessor against which the V2 paper states its savings (DeepSeek LLM paper, table 2)."""

PUBLISHED: dict[str, Shape] = {
    "v2-236b": Shape(
        name="DeepSeek-V2",
        vocab=102400,
        hidden=5120,
        layers=60,
        heads=128,
        dense_width=12288,
        attention=LatentAttention(q_lora_rank=1536, kv_lora_rank=512, **_V2_HEAD),
        experts=Experts(routed=160, shared=2, per_token=6, width=1536, first_dense=1, correction_bias=False),
        context=163840,
    ),
    "v2-lite": Shape(
        name="DeepSeek-V2-Lite",
        vocab=102400,
        hidden=2048,
        layers=27,
        heads=16,
        dense_width=10944,
        attention=LatentAttention(q_lora_rank=None, kv_lora_rank=512, **_V2_HEAD),
        experts=Experts(routed=64, shared=2, per_token=6, width=1408, first_dense=1, correction_bias=False),
        context=163840,
    ),
    "moe-16b": Shape(
        name="DeepSeekMoE 16B",
        vocab=102400,
        hidden=2048,
        layers=28,
        heads=16,
        dense_width=10944,
        attention=GroupedAttention(kv_heads=16, head_dim=128),
        experts=Experts(routed=64, shared=2, per_token=6, width=1408, first_dense=1, correction_bias=False),
    ),
    "deepseek-67b": DEEPSEEK_67B,
}
"""Name on the command line → shape."""
