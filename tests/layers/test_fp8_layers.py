"""Layers in FP8 beside their plain twins, and which layers of a model become them."""

import pytest
import torch
from torch import Tensor, nn

from nautile.layers.ffn import SwiGLU
from nautile.layers.fp8 import Fp8Experts, Fp8GroupedLinear, Fp8Linear, Fp8SwiGLU, in_fp8_
from nautile.layers.linear import Linear
from nautile.layers.moe.experts import Experts
from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM
from nautile.ops import group_layout
from nautile.ops.numerics import FP8_DIFF, calc_diff
from nautile.train.precision import prepare_model_

SEVERAL = 4 * FP8_DIFF
"""Of a layer with several FP8 products behind each other."""


def filled(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return layer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def results(layer: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Output, then gradients of the first input, of routing weights, and of the parameters."""
    floats = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    y = layer(*floats)
    leaves = [*(x for x in floats if x.is_floating_point()), *layer.parameters()]
    return [y.detach(), *torch.autograd.grad(y, leaves, normal(*y.shape, seed=5))]


def assert_near(got: list[Tensor], want: list[Tensor]) -> None:
    for which, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert calc_diff(a, b) < SEVERAL, f"tensor {which}"


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    plain = filled(Linear(96, 200, bias=False))
    if bias:
        plain.bias = nn.Parameter(normal(200))
    assert_near(results(Fp8Linear.of(plain), normal(2, 17, 96)), results(plain, normal(2, 17, 96)))


def test_swiglu() -> None:
    plain = filled(SwiGLU(96, 160))
    assert_near(results(Fp8SwiGLU.of(plain), normal(2, 17, 96)), results(plain, normal(2, 17, 96)))


@pytest.mark.parametrize("chosen", ["spread", "one"])
def test_experts(chosen: str) -> None:
    T, K, E = 40, 2, 5
    plain, generator = filled(Experts(E, 96, 48)), torch.Generator().manual_seed(1)
    if chosen == "one":
        experts_TK = torch.tensor([[3, 1]]).expand(T, K).contiguous()
    else:
        experts_TK = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    x, weights_TK = normal(T, 96), torch.rand(T, K, generator=generator)
    got, want = (results(layer, x, experts_TK, weights_TK) for layer in (Fp8Experts.of(plain), plain))
    assert_near(got, want)
    assert all((gradient[4] == 0).all() for gradient in got[-2:]) == (chosen != "spread")


def test_experts_without_tokens() -> None:
    layer = Fp8Experts.of(filled(Experts(3, 32, 16)))
    assert layer(normal(0, 32), torch.zeros(0, 2).long(), torch.zeros(0, 2)).shape == (0, 32)


def test_grouped_linear() -> None:
    layer = filled(Fp8GroupedLinear(3, 64, 40))
    ends_G = group_layout.ends_of(torch.tensor([7, 0, 130]))
    x = normal(300, 64)
    y = layer(x, ends_G)
    for g, (start, stop) in enumerate(group_layout.spans(ends_G)):
        assert calc_diff(y[start:stop], x[start:stop] @ layer.weight[g].t()) < FP8_DIFF


def test_which_layers_of_a_model_change_and_that_parameters_do_not() -> None:
    model = DeepseekV3ForCausalLM(V3_NANO)
    before = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    state = list(model.state_dict())
    prepare_model_(model, "bf16")
    assert not any("Fp8" in type(module).__name__ for module in model.modules())
    prepare_model_(model, "fp8")
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == before
    assert list(model.state_dict()) == state
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["lm_head"] is Linear and kinds["mtp.0.eh_proj"] is nn.Linear
    for name, kind in kinds.items():
        if name.endswith(("_a_proj", "_b_proj", "_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj")):
            assert kind is Fp8Linear, name
        if name.endswith("mlp.experts"):
            assert kind is Fp8Experts, name
        if name.endswith("shared_experts"):
            assert kind is Fp8SwiGLU, name
    assert kinds["mtp.0.block.mlp.experts"] is Fp8Experts
    assert len(model.expert_parameters()) == 2 * sum(kind is Fp8Experts for kind in kinds.values())


def test_layers_of_other_types_are_left_alone() -> None:
    class Special(Linear):
        pass

    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Special(4, 4), "c": nn.Sequential(Linear(4, 4))})
    in_fp8_(module)
    assert [type(m) for m in (module["a"], module["b"], module["c"][0])] == [nn.Linear, Special, Fp8Linear]
