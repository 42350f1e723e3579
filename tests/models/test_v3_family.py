"""The family's configuration, presets and stages."""

from dataclasses import replace

import pytest
import torch

from nautile.core.context import ForwardContext
from nautile.core.errors import UserError
from nautile.layers.block import BlockState
from nautile.models.deepseek_v3.config import PRESETS, V3_671B, V3_MICRO, V3_NANO, DeepseekV3Config
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM


def test_v3_has_the_published_number_of_parameters() -> None:
    """671.03 B with the correction biases; 14.0 B more in the MTP module without its copies of embedding and head."""
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(V3_671B)
    main = {name: t.numel() for name, t in model.state_dict().items() if not name.startswith("mtp.")}
    assert sum(main.values()) == 671_026_419_200


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_sound_and_survive_their_own_config_json(preset: str) -> None:
    config = PRESETS[preset]
    config.check()
    assert DeepseekV3Config.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "change",
    [
        {"n_group": 3},
        {"topk_group": 5},
        {"num_experts_per_tok": 9},
        {"n_group": 16},
        {"qk_rope_head_dim": 15},
        {"first_k_dense_replace": 9},
        {"n_group": 0},
        {"num_attention_heads": 0},
    ],
)
def test_contradictions_are_refused_with_the_field_named(change: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        replace(V3_MICRO, **{"n_routed_experts": 16, **change}).check()


def test_stages_fold_to_the_forward() -> None:
    model = DeepseekV3ForCausalLM(V3_NANO)
    model.init_weights(torch.Generator().manual_seed(0))
    dense, moe = model.model.layers[0], model.model.layers[1]
    assert [name for name, _ in dense.stages()] == ["attention", "mlp"]
    assert [name for name, _ in moe.stages()] == ["attention", "dispatch", "experts", "combine"]
    ctx = ForwardContext.for_tokens(torch.zeros(2, 5, dtype=torch.long))
    x = torch.randn(2, 5, V3_NANO.hidden_size)
    state = BlockState(x, ctx)
    for _, stage in moe.stages():
        state = stage(state)
    assert torch.equal(state.x_BSD, moe(x, ctx).x_BSD)


def test_initial_weights_have_the_configured_spread() -> None:
    model = DeepseekV3ForCausalLM(V3_MICRO)
    model.init_weights(torch.Generator().manual_seed(0))
    std = V3_MICRO.initializer_range
    assert float(model.model.layers[1].mlp.experts.down_proj.detach().std()) == pytest.approx(std, rel=0.02)
    assert float(model.mtp[0].eh_proj.weight.detach().std()) == pytest.approx(std, rel=0.02)
    assert torch.equal(model.model.norm.weight, torch.ones(V3_MICRO.hidden_size))
    twin = DeepseekV3ForCausalLM(V3_MICRO)
    twin.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_routers_stand_in_the_order_of_their_decisions() -> None:
    model = DeepseekV3ForCausalLM(replace(V3_NANO, num_nextn_predict_layers=1))
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, V3_NANO.vocab_size, (2, 9))
    ctx = ForwardContext.for_tokens(tokens)
    seen = []
    for router in model.routers():
        router.register_forward_hook(lambda module, _, out: seen.append((module, out)))
    out = model.hidden(ctx)
    ahead = model.predict_ahead(out.hidden_BSD, tokens, ctx)
    decisions = [*out.routing, *(r for o in ahead for r in o.routing)]
    assert [module for module, _ in seen] == model.routers()
    assert [id(r) for _, r in seen] == [id(r) for r in decisions]
