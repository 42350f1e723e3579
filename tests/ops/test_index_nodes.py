"""The indexer's ops inside torch.compile: nodes that run what eager calls do, with gradients, and no broken graph."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.core.context import ForwardContext, IndexStage
from nautile.layers.attention.indexer import Indexer
from nautile.layers.attention.sparse_mla import SparseMLA
from nautile.layers.rope import Rope


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(function, leaves: list[Tensor], *rest: object) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    y = function(*leaves, *rest)
    (2 * y.cos().sum()).backward()
    return [y.detach(), *(x.grad for x in leaves)]


INDEX = [normal(2, 9, 3, 8), normal(2, 9, 8, seed=1), normal(2, 9, 3, seed=2)]
TARGET = (normal(2, 9, 2, 6, seed=3), normal(2, 9, 2, 6, seed=4), 0.4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("op", "rest"), [("index_scores", ()), ("indexer_kl", TARGET)], ids=["scores", "loss"])
def test_compiled_calls_equal_eager_ones(op: str, rest: tuple, backend: str) -> None:
    function = getattr(ops, op)
    compiled = torch.compile(lambda *x: function(*x), backend="aot_eager", fullgraph=True)
    with ops.use(backend):
        want, got = run(function, INDEX, *rest), run(compiled, INDEX, *rest)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_selection_compiles() -> None:
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    compiled = torch.compile(lambda x: ops.top_rows(x, seen, 4), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(normal(2, 9, 9)), ops.top_rows(normal(2, 9, 9), seen, 4))


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_nodes_keep_what_their_fakes_promise(backend: str) -> None:
    """Shapes, dtypes and strides, also of inputs that are transposes: a compiler lays out memory by them."""
    q, k, weights = (normal(2, *size, seed=1).float().mT.requires_grad_() for size in ((9, 8, 3), (8, 9), (3, 9)))
    target = [x.float() for x in TARGET[:2]]
    with ops.use(backend):
        for node, arguments in (
            (torch.ops.nautile.index_scores, (q, k, weights)),
            (torch.ops.nautile.index_scores_backward, (q, k, weights, normal(2, 9, 9).float().mT)),
            (torch.ops.nautile.indexer_kl, (q, k, weights, *target, 0.4, None, None)),
            (torch.ops.nautile.top_rows, (normal(2, 9, 9).float().mT, torch.ones(9, 9).bool(), 4)),
        ):
            torch.library.opcheck(node, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_learning_attention_is_one_graph(stage: IndexStage) -> None:
    indexer = Indexer(21, 14, 16, 8, rope_dim=6, topk=4)
    sizes = {"q_lora_rank": 14, "kv_lora_rank": 10, "nope_dim": 5, "rope_dim": 6, "v_dim": 9}
    layer = SparseMLA(0, 21, 3, **sizes, rope=Rope(6, 100.0), indexer=indexer).double().train()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    x, ctx = normal(2, 11, 21), ForwardContext.for_tokens(torch.zeros(2, 11).long(), index_stage=stage)
    results = []
    for attend in (layer.attend, torch.compile(layer.attend, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        y, loss = attend(x, ctx)
        assert loss is not None
        (y.sin().sum() + loss).backward()
        results.append([y.detach(), loss.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == 2 + len(list(layer.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
