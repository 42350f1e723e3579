"""How an indexer learns inside sparse attention: what its loss is, what it reaches, and where it leads."""

import pytest
import torch
from torch import Tensor

from nautile.core.context import ForwardContext, IndexStage
from nautile.layers.attention.indexer import Indexer
from nautile.layers.attention.mla import MLA
from nautile.layers.attention.sparse_mla import SparseMLA, causal
from nautile.layers.rope import Rope

DIM, LENGTH, TOPK = 21, 24, 7
SHAPE = {"q_lora_rank": 14, "kv_lora_rank": 10, "nope_dim": 5, "rope_dim": 6, "v_dim": 9}


def make(topk: int = TOPK, fp8: bool = False) -> SparseMLA:
    indexer = Indexer(DIM, 14, 16, 8, rope_dim=6, topk=topk, fp8=fp8)
    attention = SparseMLA(0, DIM, 3, **SHAPE, rope=Rope(6, 10000.0), indexer=indexer).double().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)
    return attention


def hidden(seed: int = 1, B: int = 2, S: int = LENGTH) -> Tensor:
    return torch.randn(B, S, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(stage: IndexStage | None, B: int = 2, S: int = LENGTH, cuts: Tensor | None = None) -> ForwardContext:
    return ForwardContext.for_tokens(torch.zeros(B, S, dtype=torch.int64), cuts, stage)


def distributions(attention: SparseMLA, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    """Scores of the attention per head [B, H, S, T] and of the indexer [B, S, T], both before any mask."""
    angles = attention.rope.cos_sin(ctx.positions_BS)
    q, k, _ = attention.expand(*attention.project(x, ctx))
    keys = attention.indexer.keys(x, angles)
    index = attention.indexer.scores(x, attention.query_source(x), keys, angles)
    return attention.scale * torch.einsum("bshq,bthq->bhst", q, k), index


def expected_loss(attention: SparseMLA, x: Tensor, ctx: ForwardContext, visible: Tensor) -> Tensor:
    heads, index = distributions(attention, x, ctx)
    p = heads.masked_fill(~visible[:, None], float("-inf")).softmax(-1).sum(1)
    p = p / p.sum(-1, keepdim=True)
    log = index.masked_fill(~visible, float("-inf")).log_softmax(-1).masked_fill(~visible, 0.0)
    return (torch.xlogy(p, p) - p * log).sum() / x.shape[:2].numel()


def chosen(attention: SparseMLA, x: Tensor, ctx: ForwardContext) -> Tensor:
    angles = attention.rope.cos_sin(ctx.positions_BS)
    keys = attention.indexer.keys(x, angles)
    return attention.indexer.mask(x, attention.query_source(x), keys, angles, causal(ctx))


CUTS = torch.tensor([0, 9, 20, 24, 40, 48])


@pytest.mark.parametrize("cuts", [None, CUTS], ids=["whole", "documents"])
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_the_loss_is_the_papers(stage: IndexStage, cuts: Tensor | None) -> None:
    attention, x, ctx = make(), hidden(), whole(stage, cuts=cuts)
    visible = causal(ctx) if stage == "warmup" else chosen(attention, x, ctx)
    _, loss = attention.attend(x, ctx)
    torch.testing.assert_close(loss, expected_loss(attention, x, ctx, visible), atol=1e-12, rtol=1e-10)


def test_while_the_indexer_selects_everything_both_stages_are_one() -> None:
    attention, x = make(topk=LENGTH), hidden()
    (y, loss), (same_y, same_loss) = (attention.attend(x, whole(stage)) for stage in ("warmup", "sparse"))
    assert loss is not None and torch.equal(loss, same_loss) and torch.equal(y, same_y)


def test_each_stage_reads_what_it_should() -> None:
    sparse, x = make(), hidden()
    dense = MLA(0, DIM, 3, **SHAPE, rope=sparse.rope).double()
    dense.load_state_dict({name: t for name, t in sparse.state_dict().items() if "indexer" not in name})
    outputs = {stage: sparse.attend(x, whole(stage)) for stage in (None, "dense", "warmup", "sparse")}
    everything = dense(x, whole(None))
    for stage in ("dense", "warmup"):
        torch.testing.assert_close(outputs[stage][0], everything, atol=1e-12, rtol=1e-12)
    assert torch.equal(outputs[None][0], outputs["sparse"][0])
    assert (outputs["sparse"][0] - everything).abs().max() > 1e-3
    assert outputs[None][1] is None and outputs["dense"][1] is None
    assert all(sparse.eval().attend(x, whole(stage))[1] is None for stage in outputs)


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_neither_loss_reaches_the_other_side(stage: IndexStage) -> None:
    attention, x = make(), hidden().requires_grad_()
    y, loss = attention.attend(x, whole(stage))
    assert loss is not None
    loss.backward(retain_graph=True)
    assert x.grad is None
    for name, parameter in attention.named_parameters():
        assert (parameter.grad is not None) == name.startswith("indexer."), name
        assert parameter.grad is None or parameter.grad.norm() > 0
    attention.zero_grad()
    y.sin().sum().backward()
    for name, parameter in attention.named_parameters():
        assert (parameter.grad is None) == name.startswith("indexer."), name


def test_gradients_pass_the_fp8_rounding_unchanged() -> None:
    grads = []
    for fp8 in (False, True):
        attention = make(fp8=fp8)
        _, loss = attention.attend(hidden(), whole("warmup"))
        assert loss is not None
        (1e-4 * loss).backward()  # smaller than FP8 numbers can be
        grads.append(torch.cat([p.grad.flatten() for p in attention.indexer.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.98
    assert 0.9 < grads[0].norm() / grads[1].norm() < 1.1


def overlap(attention: SparseMLA, x: Tensor) -> float:
    """Share of the attention's own top-k that the indexer selects, over the queries that have to choose."""
    ctx = whole(None, *x.shape[:2])
    heads, _ = distributions(attention, x, ctx)
    p = heads.masked_fill(~causal(ctx)[:, None], float("-inf")).softmax(-1).mean(1)
    best = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(TOPK).indices, True)
    both = (best & chosen(attention, x, ctx))[:, TOPK:].sum().item()
    return both / (x.shape[0] * (x.shape[1] - TOPK) * TOPK)


def learn(attention: SparseMLA, stage: IndexStage, steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.Adam(attention.indexer.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        x = hidden(seed=10 + step, B=4)
        _, loss = attention.attend(x, whole(stage, 4))
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_warm_up_teaches_it_what_attention_reads() -> None:
    """On hidden states that it never saw; then the sparse stage goes on from there."""
    attention, unseen = make(), hidden(seed=5, B=8)
    before = overlap(attention, unseen)
    losses = learn(attention, "warmup", steps=150, lr=1e-2)
    after = overlap(attention, unseen)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert after > before + 0.2, (before, after)
    losses = learn(attention, "sparse", steps=60, lr=3e-3)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert overlap(attention, unseen) > before + 0.2
