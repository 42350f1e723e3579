"""torch.compile keeps ops with kernels of their own as nodes and traces the references of others: no graph breaks."""

import pytest
import torch
from torch import nn

from nautile.core.context import ForwardContext
from nautile.layers.attention.mla import MLA
from nautile.layers.rope import Rope
from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM
from nautile.models.llama.config import LlamaConfig
from nautile.models.llama.model import LlamaForCausalLM


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def test_a_dense_model_is_one_graph_forward_and_backward() -> None:
    config = LlamaConfig(
        vocab_size=71, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 71, (2, 9), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wanted, got = [gradient_and_logits(m, model, tokens) for m in (model, compiled)]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def gradient_and_logits(called: nn.Module, model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    logits = called(tokens)
    logits.sin().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_latent_attention_is_one_graph() -> None:
    layer = MLA(0, 21, 3, q_lora_rank=14, kv_lora_rank=10, nope_dim=5, rope_dim=6, v_dim=9, rope=Rope(6, 100.0))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    x, ctx = torch.randn(2, 11, 21, generator=generator), ForwardContext.for_tokens(torch.zeros(2, 11).long())
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, ctx), layer(x, ctx), atol=1e-5, rtol=1e-5)


def test_a_mixture_breaks_only_where_loads_are_counted() -> None:
    model = DeepseekV3ForCausalLM(V3_NANO).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    report = torch._dynamo.explain(model)(torch.zeros(1, 9).long())
    assert not any("ContextVar" in str(reason.reason) for reason in report.break_reasons)
