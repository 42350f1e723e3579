"""Multi-token prediction against the formula written out token by token in float64."""

from dataclasses import replace

import torch

from nautile.core.context import ForwardContext
from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM


def tiny(depths: int) -> DeepseekV3ForCausalLM:
    model = DeepseekV3ForCausalLM(replace(V3_NANO, vocab_size=61, num_nextn_predict_layers=depths))
    model.init_weights(torch.Generator().manual_seed(5))
    return model.eval()


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def test_embedding_first_and_hidden_state_after_the_final_norm() -> None:
    model = tiny(2)
    tokens = torch.randint(0, 61, (2, 14), generator=torch.Generator().manual_seed(0))
    ctx = ForwardContext.for_tokens(tokens)
    hidden = model.hidden(ctx).hidden_BSD
    logits = model.mtp_logits(tokens)
    for depth, module in enumerate(model.mtp, start=1):
        length = 14 - depth
        embedded = model.model.embed_tokens.weight[tokens[:, depth:]]
        joined = torch.cat([rms(embedded, module.enorm.weight), rms(hidden[:, :length], module.hnorm.weight)], dim=-1)
        x = joined @ module.eh_proj.weight.T
        x = module.block(x, ForwardContext.for_tokens(tokens[:, :length])).x_BSD
        hidden = rms(x, module.shared_head.norm.weight)
        torch.testing.assert_close(logits[depth - 1], hidden @ model.lm_head.weight.T, atol=1e-5, rtol=1e-5)


def test_the_filled_last_positions_change_nothing_before_them() -> None:
    model = tiny(1)
    window = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(2))
    ctx = ForwardContext.for_tokens(window[:, :11])
    hidden = model.hidden(ctx).hidden_BSD
    whole = model.predict_ahead(hidden, window, ctx)[0].hidden_BSD
    cut = model.predict_ahead(hidden, window[:, :11], ctx)[0].hidden_BSD
    torch.testing.assert_close(whole[:, :10], cut[:, :10])
    assert not torch.equal(whole[:, 10], cut[:, 10])
