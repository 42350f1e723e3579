"""Negative controls: each known trap, fallen into on purpose, changes the logits of a parity case visibly."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CASES
from torch.nn import functional as F

import nautile
from nautile import ops
from nautile.layers.moe import router as routing
from nautile.layers.moe.router import Router
from nautile.models.causal_lm import CausalLM
from nautile.ops.reference import routing as selection

Break = Callable[[CausalLM, pytest.MonkeyPatch], None]


def some_tokens() -> torch.Tensor:
    return torch.randint(0, 259, (3, 37), generator=torch.Generator().manual_seed(7))


def on_routers(**changes: Any) -> Break:
    """Give every router other settings than config.json says."""

    def apply(model: CausalLM, _: pytest.MonkeyPatch) -> None:
        assert model.routers()
        for router in model.routers():
            for name, value in changes.items():
                assert getattr(router, name) != value
                setattr(router, name, value)

    return apply


def mask_with_zero(_: CausalLM, patch: pytest.MonkeyPatch) -> None:
    """Dropped groups get 0 instead of -inf, as older code did: with negative biases they win."""
    right = selection.keep_groups

    def wrong(*arguments: Any) -> torch.Tensor:
        kept = right(*arguments)
        return torch.where(kept.isinf(), torch.zeros(()), kept)

    patch.setattr(selection, "keep_groups", wrong)


def ignore_bias(model: CausalLM, _: pytest.MonkeyPatch) -> None:
    for router in model.routers():
        router.e_score_correction_bias = None


def round_bias(model: CausalLM, _: pytest.MonkeyPatch) -> None:
    """bfloat16 near the published values of 5 steps by 0.03: what separates experts is lost."""
    for router in model.routers():
        router.e_score_correction_bias = (router.e_score_correction_bias + 30).bfloat16().float()


def weigh_with_bias(model: CausalLM, _: pytest.MonkeyPatch) -> None:
    """Weights taken from the biased scores instead of the plain ones."""

    def reweigh(router: Router, inputs: tuple[torch.Tensor], decision: routing.Routing) -> routing.Routing:
        logits_TE = F.linear(inputs[0].flatten(0, 1), router.weight)
        biased_TE = logits_TE.sigmoid() + router.e_score_correction_bias
        weights_TK = biased_TE.gather(1, decision.experts_TK)
        return replace(decision, weights_TK=router.scaling_factor * weights_TK / weights_TK.sum(-1, keepdim=True))

    for router in model.routers():
        router.register_forward_hook(reweigh)


def score_groups_by_best(_: CausalLM, patch: pytest.MonkeyPatch) -> None:
    """A group scored by its best expert where its two best count, as noaux_tc wants."""
    right = routing.select
    patch.setattr(routing, "select", lambda s, b, method, *rest: right(s + b, None, "group_limited_greedy", *rest))


def score_groups_by_two(_: CausalLM, patch: pytest.MonkeyPatch) -> None:
    right = routing.select
    patch.setattr(routing, "select", lambda s, b, method, *rest: right(s, b, "noaux_tc", *rest))


def other_rotation(_: CausalLM, patch: pytest.MonkeyPatch) -> None:
    """Half-split where pairs are interleaved, and the other way round."""
    interleaved, half_split = ops.rotate_interleaved, ops.rotate_half_split
    patch.setattr(ops, "rotate_interleaved", half_split)
    patch.setattr(ops, "rotate_half_split", interleaved)


def on_attention(change: Callable[[Any], None]) -> Break:
    def apply(model: CausalLM, _: pytest.MonkeyPatch) -> None:
        for block in model.model.layers:
            change(block.self_attn)

    return apply


def forget_temperature(attention: Any) -> None:
    attention.scale /= attention.rope.softmax_factor


def latent_eps_from_config(attention: Any) -> None:
    """The latent norms take 1e-6 whatever rms_norm_eps says; a large one makes the difference show."""
    attention.kv_a_layernorm.eps = 1e-2


def unscaled_frequencies(attention: Any) -> None:
    attention.rope.frequencies = attention.rope.frequencies * 4.0


def one_group(attention: Any) -> None:
    attention.k_proj.bias = None


TRAPS: dict[str, tuple[str, Break]] = {
    "dropped groups masked with zero": ("v3", mask_with_zero),
    "dropped groups masked with zero in VL2": ("vl2's language model", mask_with_zero),
    "bias ignored": ("v3", ignore_bias),
    "bias ignored in VL2": ("vl2's language model", ignore_bias),
    "bias kept in bfloat16": ("v3", round_bias),
    "weights taken with the bias": ("v3", weigh_with_bias),
    "groups scored by their best expert": ("v3", score_groups_by_best),
    "V2's groups scored by two": ("v2", score_groups_by_two),
    "group limit ignored": ("v2", on_routers(method="greedy")),
    "V3's group limit ignored": ("v3", on_routers(topk_group=4)),
    "softmax for sigmoid": ("v3", on_routers(scoring_func="softmax")),
    "scoring_func ignored by V2": ("vl2's language model", on_routers(scoring_func="softmax")),
    "sigmoid for softmax": ("v2-lite", on_routers(scoring_func="sigmoid")),
    "norm_topk_prob taken for true": ("v2-lite", on_routers(normalise=True)),
    "norm_topk_prob ignored": ("v2, weights normalised", on_routers(normalise=False)),
    "norm_topk_prob ignored by V3": ("v3", on_routers(normalise=False)),
    "norm_topk_prob taken for true in MoE-16B": ("moe-16b", on_routers(normalise=True)),
    "scaling factor ignored": ("v2", on_routers(scaling_factor=1.0)),
    "scaling factor dropped after normalising": ("v2, weights normalised", on_routers(scaling_factor=1.0)),
    "MLA rotated half-split": ("v3", other_rotation),
    "MoE-16B rotated interleaved": ("moe-16b", other_rotation),
    "Coder rotated interleaved": ("coder, grouped", other_rotation),
    "linear scaling ignored": ("coder, grouped", on_attention(unscaled_frequencies)),
    "YaRN's temperature forgotten": ("v3", on_attention(forget_temperature)),
    "eps of the latent norms": ("v3 without query latent, eps 1e-5", on_attention(latent_eps_from_config)),
    "bias of keys forgotten": ("r1-distill-qwen", on_attention(one_group)),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_the_trap_shows(trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, fall_into = TRAPS[trap]
    oracle, tokens = CASES[name].make(), some_tokens()
    CASES[name].write(oracle, tmp_path, "published")
    ours = nautile.load(tmp_path)
    with torch.no_grad():
        expected = oracle(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, atol=2e-4, rtol=2e-4)
        fall_into(ours, monkeypatch)
        assert (ours(tokens) - expected).abs().max() > 0.01
