"""Training a V3.2 model: dense stretch, warm-up of the indexers alone, sparse stretch; and that the indexers learn."""

from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file

from nautile.core.context import ForwardContext
from nautile.core.errors import UserError
from nautile.core.run_folder import RunFolder
from nautile.models.deepseek_v32.config import V32_NANO, DeepseekV32Config
from nautile.models.deepseek_v32.model import DeepseekV32ForCausalLM
from nautile.models.io import load_model
from nautile.train.losses import pretrain_loss
from nautile.train.optim import clip_gradients_, train_only_indexers_
from nautile.train.pretrain import pretrain
from nautile.train.recipe import IndexerConfig, load_recipe
from nautile.train.schedule import settings_at

TINY = replace(V32_NANO, vocab_size=300, hidden_size=32, num_hidden_layers=2, intermediate_size=64, index_topk=8)


@pytest.fixture(scope="module")
def model() -> DeepseekV32ForCausalLM:
    model = DeepseekV32ForCausalLM(TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.train()


@pytest.fixture(scope="module")
def tokens_BW() -> torch.Tensor:
    return torch.randint(0, 300, (2, 25), generator=torch.Generator().manual_seed(1))


def gradients(model, tokens_BW, **stage) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    pretrain_loss(model, tokens_BW, 0.3, 1e-2, **stage).total.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_the_losses_of_all_layers_are_collected_and_weighed(model, tokens_BW) -> None:
    dense = pretrain_loss(model, tokens_BW, 0.3, 1e-2, index_stage="dense")
    warmup = pretrain_loss(model, tokens_BW, 0.3, 1e-2, index_weight=0.25, index_stage="warmup")
    assert dense.index == 0.0 < warmup.index
    torch.testing.assert_close(warmup.total, dense.total + 0.25 * warmup.index)
    ctx = ForwardContext.for_tokens(tokens_BW[:, :-1], index_stage="warmup")
    output = model.hidden(ctx)
    ahead = model.predict_ahead(output.hidden_BSD, tokens_BW, ctx)
    losses = [*output.index_losses, *(loss for module in ahead for loss in module.index_losses)]
    assert len(losses) == 2 + 1  # the decoder's layers and the MTP module's
    torch.testing.assert_close(sum(losses).detach(), warmup.index)


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_the_rest_of_the_model_does_not_notice_it(model, tokens_BW, stage) -> None:
    without = gradients(model, tokens_BW, index_weight=0.0, index_stage=stage)
    with_it = gradients(model, tokens_BW, index_weight=3.0, index_stage=stage)
    for name, grad in with_it.items():
        if ".indexer." in name:
            assert grad.norm() > 0 and not without[name].any(), name
        else:
            assert torch.equal(grad, without[name]), name


def test_gradients_are_clipped_apart(model, tokens_BW) -> None:
    gradients(model, tokens_BW, index_weight=1e6, index_stage="sparse")
    rest, indexers = clip_gradients_(model, 1e-3)
    assert indexers > 1e3 * rest
    norms = [
        torch.stack([p.grad.norm() for n, p in model.named_parameters() if (".indexer." in n) == theirs]).norm()
        for theirs in (False, True)
    ]
    torch.testing.assert_close(torch.stack(norms), torch.full((2,), 1e-3), rtol=1e-3, atol=0)


def test_frozen_parameters_have_no_gradient(model, tokens_BW) -> None:
    train_only_indexers_(model, True)
    grads = gradients(model, tokens_BW, index_stage="warmup")
    train_only_indexers_(model, False)
    assert all((grad is not None) == (".indexer." in name) for name, grad in grads.items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.fixture(scope="module")
def staged(recipe):
    """Twelve steps: four dense, four of warm-up, four sparse; a checkpoint after every second one."""
    return replace(
        recipe,
        model=TINY,
        indexer=IndexerConfig(dense_until=1 / 3, warmup_until=2 / 3, warmup_lr=2e-2),
        train=replace(recipe.train, steps=12, checkpoint_every=2, validate_every=4, keep_checkpoints=20),
    )


@pytest.fixture(scope="module")
def staged_run(staged, data, tmp_path_factory):
    run = RunFolder.create(tmp_path_factory.mktemp("staged") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nautile.train.begin.measure_gemm_peak", lambda dtype: 100.0)
        pretrain(staged, run, data)
    return run


def test_the_schedule_names_each_steps_stage(staged) -> None:
    settings = [settings_at(staged, step) for step in range(12)]
    assert [s.index_stage for s in settings] == ["dense"] * 4 + ["warmup"] * 4 + ["sparse"] * 4
    assert {s.lr for s in settings[4:8]} == {2e-2} and {s.bias_speed for s in settings[4:8]} == {0.0}
    assert settings_at(replace(staged, indexer=IndexerConfig()), 0).index_stage == "sparse"
    assert settings_at(load_recipe("v3-nano"), 0).index_stage is None


def test_each_stretch_moves_what_it_should(staged_run) -> None:
    at = {
        step: load_file(staged_run.checkpoints / f"step-{step:06d}" / "model.safetensors") for step in (2, 4, 6, 8, 12)
    }

    def moved(a: int, b: int) -> tuple[set[str], set[str]]:
        names = {name for name, tensor in at[a].items() if not tensor.equal(at[b][name])}
        indexers = {name for name in at[a] if ".indexer." in name}
        return names & indexers, names - indexers

    indexers = {name for name in at[2] if ".indexer." in name}
    assert moved(2, 4)[0] == set() and moved(2, 4)[1]
    for a, b in ((4, 6), (6, 8)):
        assert moved(a, b) == (indexers, set()), "and neither a router's bias nor a norm"
    assert moved(8, 12)[0] == indexers and any("e_score" in name for name in moved(8, 12)[1])


def test_metrics_tell_stage_and_loss(staged_run) -> None:
    lines = staged_run.read_metrics()
    assert [line["index_stage"] for line in lines] == ["dense"] * 4 + ["warmup"] * 4 + ["sparse"] * 4
    index = [line["index_loss"] for line in lines]
    assert index[:4] == [0.0] * 4 and index[7] < index[4]
    assert lines[4]["grad_norm"] == 0.0 < lines[8]["grad_norm"]
    assert lines[0]["index_grad_norm"] == 0.0 < min(line["index_grad_norm"] for line in lines[4:])


@pytest.mark.parametrize("at", [4, 6, 8])
def test_a_resumed_run_is_the_same(at, staged, staged_run, data, tmp_path, assert_same_run) -> None:
    run = RunFolder.create(tmp_path / "run")
    pretrain(replace(staged, train=replace(staged.train, stop_after=at)), run, data)
    pretrain(staged, run, data, resume=True)
    # Where it stopped it validated on more tokens, and said so nowhere else.
    assert_same_run(run, staged_run)


def test_the_exported_model_is_a_v32(staged_run) -> None:
    loaded = load_model(staged_run.path)
    assert isinstance(loaded, DeepseekV32ForCausalLM) and loaded.config == TINY


def test_a_v3_model_has_no_indexers_to_train(recipe) -> None:
    with pytest.raises(UserError, match="it has no indexers"):
        replace(recipe, indexer=IndexerConfig(warmup_until=0.5)).check()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ({"indexer.dense_until": 0.9}, "lies after indexer.warmup_until"),
        ({"indexer.warmup_until": 1.5}, "outside 0..1"),
        ({"indexer.warmup_lr": 0.0}, "warmup_lr is 0.0"),
        ({"indexer.weight": -1.0}, "a weight is negative"),
    ],
)
def test_contradictions_are_refused(override, told) -> None:
    with pytest.raises(UserError, match=told):
        load_recipe("v32-nano", override)


def overlap(model, tokens_BS) -> float:
    """Share of the attention's own best rows that the indexers select, over layers and queries that have to choose."""
    shares = []

    def look(layer, arguments, _) -> None:
        x, ctx = arguments
        angles = layer.rope.cos_sin(ctx.positions_BS)
        q, k, _ = layer.expand(*layer.project(x, ctx))
        scores = layer.scale * torch.einsum("bshq,bthq->bhst", q, k)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1).mean(1)
        K = layer.indexer.topk
        best = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(K).indices, True)
        index = layer.indexer, layer.query_source(x), layer.indexer.keys(x, angles)
        chosen = index[0].mask(x, *index[1:], angles, seen.expand(len(x), -1, -1))
        shares.append((best & chosen)[:, K:].sum() / best[:, K:].sum())

    hooks = [block.self_attn.register_forward_hook(look) for block in model.model.layers]
    with torch.no_grad():
        model.eval()(tokens_BS)
    for hook in hooks:
        hook.remove()
    return torch.stack(shares).mean().item()


def test_the_indexers_of_a_model_learn_what_its_attention_reads(model) -> None:
    """A frozen model with sharpened attention: the loss falls, and on unseen tokens the selection comes closer."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_b_proj.weight *= 20
    unseen = torch.randint(0, 300, (4, 48), generator=generator)
    before = overlap(model, unseen)
    model.train()
    train_only_indexers_(model, True)
    optimizer = torch.optim.AdamW(model.indexer_parameters(), lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(80):
        loss = pretrain_loss(model, torch.randint(0, 300, (4, 49), generator=generator), 0.3, 0.0, index_stage="warmup")
        loss.total.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.index.item())
    train_only_indexers_(model, False)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    after = overlap(model, unseen)
    assert after > before + 0.15, (before, after)


@pytest.fixture(scope="module")
def converted(recipe, straight):
    """The V3 of the other tests made a V3.2: a run of warm-up alone."""
    model = DeepseekV32Config(**{f.name: getattr(recipe.model, f.name) for f in fields(recipe.model)}, **SMALL_INDEXER)
    return replace(
        recipe,
        model=model,
        start=str(straight.path),
        tokenizer=replace(recipe.tokenizer, path=str(straight.model)),
        indexer=IndexerConfig(warmup_until=1.0),
        train=replace(recipe.train, steps=3, sample_every=3),
    )


SMALL_INDEXER = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 8}


def test_a_v32_starts_from_a_v3_and_its_warm_up_leaves_that_as_it_was(converted, straight, data, tmp_path) -> None:
    run = RunFolder.create(tmp_path / "run")
    pretrain(replace(converted, train=replace(converted.train, stop_after=1)), run, data)
    pretrain(converted, run, data, resume=True)
    before, after = (load_model(r.path).state_dict() for r in (straight, run))
    added = {name for name in after.keys() - before.keys() if ".indexer." in name}
    assert added and before.keys() == after.keys() - added
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert run.read_summary()["val_bits_per_byte"] == pytest.approx(straight.read_summary()["val_bits_per_byte"])
    losses = [line["index_loss"] for line in run.read_metrics()]
    assert losses[-1] < losses[0]


def test_what_a_run_starts_from_must_fit(converted, recipe, straight, data, tmp_path) -> None:
    with pytest.raises(UserError, match=r"--tokenizer\.path"):
        replace(converted, tokenizer=recipe.tokenizer).check()
    wider = replace(converted, model=replace(converted.model, intermediate_size=96))
    with pytest.raises(UserError, match=r"mlp\..* is \[32, 96\] here and \[32, 64\] there"):
        pretrain(wider, RunFolder.create(tmp_path / "run"), data)
    deeper = replace(converted, model=replace(converted.model, num_hidden_layers=3))
    with pytest.raises(UserError, match=r"does not fit the recipe's model: model\.layers\.2"):
        pretrain(deeper, RunFolder.create(tmp_path / "other"), data)
