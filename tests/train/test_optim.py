import pytest
import torch

from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM
from nautile.train.optim import build_optimizer, clip_gradient_, set_learning_rate
from nautile.train.recipe import OptimConfig


@pytest.fixture(scope="module")
def model():
    model = DeepseekV3ForCausalLM(V3_NANO)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_matrices_decay_and_norm_gains_do_not(model):
    optimizer = build_optimizer(model.named_parameters(), OptimConfig())
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, spared = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert all("norm" in name for name in spared)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= decayed
    assert any("gate_up_proj" in name for name in decayed)


def test_the_router_bias_is_no_parameter(model):
    optimised = {
        id(p) for g in build_optimizer(model.named_parameters(), OptimConfig()).param_groups for p in g["params"]
    }
    biases = [router.e_score_correction_bias for router in model.routers()]
    assert biases and all(id(bias) not in optimised for bias in biases)


def test_one_step_is_adamw_by_hand():
    weight, gain = torch.nn.Parameter(torch.full((2, 2), 3.0)), torch.nn.Parameter(torch.full((2,), 3.0))
    optimizer = build_optimizer([("w", weight), ("g", gain)], OptimConfig(weight_decay=0.5, eps=0.0))
    set_learning_rate(optimizer, 0.1)
    weight.grad, gain.grad = torch.full((2, 2), 7.0), torch.full((2,), -7.0)
    optimizer.step()
    # The first bias-corrected update is the sign of the gradient, whatever its size.
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 3.0 * (1 - 0.1 * 0.5) - 0.1))
    torch.testing.assert_close(gain.detach(), torch.full((2,), 3.0 + 0.1))


def test_clipping_scales_the_whole_gradient_and_reports_the_norm_before():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradient_([a, b], 1.0).item() == pytest.approx(5.0)
    assert [a.grad.item(), b.grad.item()] == pytest.approx([0.6, 0.8], rel=1e-4)
