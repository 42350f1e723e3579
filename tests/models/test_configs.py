"""Configurations: presets survive their own config.json, and what is not built is refused, not ignored."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from nautile.checkpoint.allocate import float32_names
from nautile.core.errors import UserError
from nautile.layers.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from nautile.models import FAMILIES
from nautile.models.family import build_model, config_from_hf, layout_of
from nautile.models.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_their_own_config_json(preset: str) -> None:
    config = PRESETS[preset]
    config.check()
    assert config_from_hf(config.to_hf()) == config
    assert config.to_hf()["model_type"] in FAMILIES


def smallest(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a family's first preset, some fields replaced."""
    config = next(config for config in PRESETS.values() if family == config.MODEL_TYPE)
    return {**config.to_hf(), **changes}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "change", [{"hidden_act": "gelu"}, {"num_attention_heads": 0}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}]
)
def test_other_mathematics_is_refused_in_every_family(family: str, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        config_from_hf(smallest(family, **change))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("deepseek_v2", {"attention_bias": True}),
        ("deepseek_v2", {"use_mla": False}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3", {"scoring_func": "sqrtsoftplus"}),
        ("deepseek_v3", {"topk_method": "foo"}),
        ("deepseek_v3", {"mlp_layer_types": ["sparse"] * 60 + ["dense"]}),
        ("deepseek_v3", {"hidden_size": "7168"}),
        ("deepseek_v3", {"hidden_size": 7168.0}),
        ("deepseek_v3", {"moe_layer_freq": [1, 1]}),
        ("llama", {"rope_scaling": [1]}),
        ("llama", {"rope_theta": "high"}),
        ("deepseek_v2", {"topk_group": 9}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"num_key_value_heads": 5}),
        ("qwen2", {"use_sliding_window": True}),
        ("deepseek", {"num_experts_per_tok": 65}),
        ("deepseek", {"moe_layer_freq": 0}),
        ("deepseek_v3", {"num_nextn_predict_layers": -1}),
    ],
)
def test_what_a_family_does_not_do_is_refused(family: str, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        config_from_hf(smallest(family, **change))


def test_an_unknown_family_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="deepseek_v33") as refused:
        config_from_hf(smallest("deepseek_v3", model_type="deepseek_v33"))
    assert "deepseek_v3" in refused.value.why
    with pytest.raises(UserError, match="deepseek_vl_v2") as refused:
        config_from_hf({"model_type": "deepseek_vl_v2", "language_config": smallest("deepseek_v2")})
    assert "language_config" in refused.value.why


def test_a_missing_size_is_named() -> None:
    published = smallest("llama")
    del published["intermediate_size"]
    with pytest.raises(UserError, match="intermediate_size is missing"):
        config_from_hf(published)


def test_older_files_that_leave_fields_out_mean_what_their_classes_mean() -> None:
    v3 = smallest("deepseek_v3")
    for name in ("scoring_func", "topk_method", "num_nextn_predict_layers", "aux_loss_alpha", "initializer_range"):
        del v3[name]
    read = config_from_hf(v3)
    assert (read.scoring_func, read.topk_method, read.num_nextn_predict_layers) == ("sigmoid", "noaux_tc", 0)
    assert (read.aux_loss_alpha, read.initializer_range) == (1e-4, 0.02)
    moe = smallest("deepseek")
    for name in ("scoring_func", "topk_method", "norm_topk_prob", "n_group", "routed_scaling_factor", "aux_loss_alpha"):
        del moe[name]
    read = config_from_hf(moe)
    assert (read.scoring_func, read.topk_method, read.norm_topk_prob) == ("softmax", "greedy", False)
    assert (read.routed_scaling_factor, read.aux_loss_alpha, read.seq_aux) == (1.0, 0.001, True)
    assert config_from_hf(smallest("deepseek_v2", q_lora_rank=None)).q_lora_rank is None


def test_rope_in_both_spellings() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    published = smallest("llama", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3})
    newer = smallest("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    del newer["rope_theta"], newer["rope_scaling"]
    assert config_from_hf(published) == config_from_hf(newer)
    assert config_from_hf(newer).rope_scaling == Llama3Scaling(**llama3)
    silent = smallest("deepseek_v3", rope_scaling={"type": "yarn", "factor": 8.0})
    assert config_from_hf(silent).rope_scaling == YarnScaling(
        factor=8.0, original_max_position_embeddings=silent["max_position_embeddings"], mscale_all_dim=0.0
    )


def test_an_expert_slice_outside_the_experts_is_refused() -> None:
    config = PRESETS["v3-nano"]
    for experts, family in ((range(6, 9), "v3-nano"), (range(4, 4), "v3-nano"), (range(1), "coder-1.3b")):
        with pytest.raises(UserError, match="cannot be held"), torch.device("meta"):
            build_model(PRESETS[family], experts)
    with torch.device("meta"):
        model = build_model(config, range(2, 4))
    layout = layout_of(config, range(2, 4))
    names = {
        piece.published
        for name, p in model.named_parameters()
        for piece in layout.pieces(name, p)
        if "experts." in name
    }
    held = {int(name.split("experts.")[1].split(".")[0]) for name in names if ".experts." in name}
    assert held == {2, 3}
    assert layout.drop_reason("model.layers.1.mlp.experts.4.up_proj.weight")
    assert layout.drop_reason("model.layers.1.mlp.experts.3.up_proj.weight") is None
    assert layout.drop_reason("model.layers.1.mlp.gate.weight") is None


@pytest.mark.parametrize(
    ("kind", "extra", "named"),
    [
        ("linear", {"fctor": 2.0}, "fctor"),
        ("yarn", {"short_factor": [1.0]}, "short_factor"),
        (None, {"mrope_section": [1]}, "mrope"),
    ],
)
def test_a_rotation_with_unknown_fields_is_refused(kind: str | None, extra: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        config_from_hf(smallest("llama", rope_scaling={"type": kind, "factor": 2.0, **extra} if kind else extra))


def test_overrides_replace_fields_in_either_spelling_and_nothing_else() -> None:
    newer = smallest("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    del newer["rope_theta"], newer["rope_scaling"]
    config = config_from_hf(newer)
    changed = config.overridden({"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert changed.rope_theta == 5.0 and changed.rope_scaling == LinearScaling(factor=2.0)
    with pytest.raises(UserError, match="rope_tetha") as refused:
        config.overridden({"rope_tetha": 5.0})
    assert "rope_theta" in refused.value.cure
    with pytest.raises(UserError, match="num_attention_heads"):
        config.overridden({"num_attention_heads": 0})
    with pytest.raises(UserError, match="hidden_size"):
        config.overridden({"hidden_size": "many"})


def test_spellings_of_old_files_are_understood() -> None:
    assert config_from_hf(smallest("deepseek_v2", topk_method="gready")).topk_method == "greedy"
    listed = smallest("deepseek_v3", mlp_layer_types=["dense"] * 2 + ["sparse"] * 59)
    assert config_from_hf(listed).first_k_dense_replace == 2


def test_rounding_a_model_leaves_what_selection_hangs_on() -> None:
    """`to`, `half` and `deepcopy` after loading: biases between 5.00 and 5.01 stay apart."""
    for family, move in (("v32-micro", "bfloat16"), ("v3-nano", "half")):
        model = build_model(replace(PRESETS[family], num_hidden_layers=2))
        model.init_weights(torch.Generator().manual_seed(0))
        bias = model.routers()[0].e_score_correction_bias
        bias.copy_(torch.linspace(5.0, 5.01, len(bias)))
        moved = getattr(copy.deepcopy(model), move)()
        assert torch.equal(moved.routers()[0].e_score_correction_bias, bias)
        assert moved.lm_head.weight.dtype.itemsize == 2
        for name in float32_names(model):
            assert torch.equal(moved.get_parameter(name), model.get_parameter(name)), name
        assert model.double().routers()[0].e_score_correction_bias.dtype == torch.float64
