"""Attention and packed products inside torch.compile: nodes that run what eager calls do, and no broken graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs

from nautile import ops
from nautile.ops.packed_weight import pack_weight


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compiled(function: Callable, **options: Any) -> tuple[Callable, AotEagerAndRecordGraphs]:
    backend = AotEagerAndRecordGraphs()
    return torch.compile(lambda *x: function(*x), backend=backend, fullgraph=True, **options), backend


def nodes(graph: torch.fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if str(node.target).startswith("nautile.")}


def run(function: Callable, leaves: list[Tensor], rest: tuple, autocast: bool = False) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(*leaves, *rest)
    first = out[0] if isinstance(out, tuple) else out
    first.float().cos().sum().backward()
    return [*(out if isinstance(out, tuple) else (out,)), *(x.grad for x in leaves if x.grad is not None)]


def equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def gathered(S: int) -> tuple[list[Tensor], tuple]:
    leaves = [normal(2, S, 3, 16), normal(2, S, 3, 8, seed=1), normal(2, 11, 16, seed=2), normal(2, 11, 8, seed=3)]
    rows = torch.stack([torch.randperm(11, generator=torch.Generator().manual_seed(s))[:4] for s in range(2 * S)])
    rows[0, 2:] = -1
    return leaves, (rows.view(2, S, 4), 0.3)


def selected(S: int) -> tuple[list[Tensor], tuple]:
    chosen = (normal(2, S, S, seed=4) > 0) | torch.eye(S).bool()
    return [normal(2, S, 3, 16), normal(2, S, 3, 16, seed=1), normal(2, S, 3, 8, seed=2)], (chosen, 0.3)


def prefill(S: int) -> tuple[list[Tensor], tuple]:
    (q, *_), (rows, _) = gathered(S)
    return [q[0], normal(11, 16, seed=5), normal(3, seed=6)], (rows[0], torch.full((S,), 3))


def prefill_op(q: Tensor, kv: Tensor, sink: Tensor, rows: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    return ops.sparse_mla_prefill(q, kv, rows, 0.3, 8, sink, lengths)


LEARNING = {
    "gathered_attention": (ops.gathered_attention, gathered),
    "selected_attention": (ops.selected_attention, selected),
    "sparse_mla_prefill": (prefill_op, prefill),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", LEARNING)
def test_values_and_gradients_are_those_of_eager_calls(op: str, backend: str, autocast: bool) -> None:
    function, inputs = LEARNING[op]
    quick, recorded = compiled(function, dynamic=True)
    with ops.use(backend):
        for S in (5, 7):
            leaves, rest = inputs(S)
            equal(run(quick, leaves, rest, autocast), run(function, leaves, rest, autocast))
    assert nodes(recorded.fw_graphs[0]) == {f"nautile.{op}.default"}
    assert nodes(recorded.bw_graphs[0]) == {"nautile.sparse_attention_backward.default"}


def test_some_gradients_alone() -> None:
    (q, q_rope, c, k_rope), rest = gathered(5)
    function = lambda c, *x: ops.gathered_attention(q, q_rope, c, k_rope, *x)  # noqa: E731
    equal(run(compiled(function)[0], [c], rest), run(function, [c], rest))


@pytest.mark.parametrize("op", ["gathered_attention", "selected_attention"])
def test_triton_runs_in_a_graph(op: str) -> None:
    function, inputs = LEARNING[op]
    leaves, rest = inputs(3)
    with ops.use("triton"):
        equal(run(compiled(function)[0], leaves, rest), run(function, leaves, rest))


def cached(T: int) -> tuple:
    chosen = (normal(2, 1, T, seed=4) > 0) | (torch.arange(T) == 0)
    positions = torch.tensor([[T - 1], [2]])
    return normal(2, 1, 4, 8), normal(2, T, 2, 8, seed=1), normal(2, T, 2, 6, seed=2), positions, 0.3, chosen


def latent(T: int) -> tuple:
    (q, q_rope, *_), _ = gathered(1)
    positions = torch.tensor([[T - 1], [2]])
    return q, q_rope, normal(2, T, 16, seed=2), normal(2, T, 8, seed=3), positions, 0.3


@pytest.mark.parametrize("op", ["cached_attention", "latent_attention"])
@torch.no_grad()
def test_cached_rows_are_read_by_one_node(op: str) -> None:
    function, inputs = getattr(ops, op), {"cached_attention": cached, "latent_attention": latent}[op]
    quick, recorded = compiled(function, dynamic=True)
    for T in (9, 12):
        equal([quick(*inputs(T))], [function(*inputs(T))])
    assert nodes(recorded.fw_graphs[0]) == {f"nautile.{op}.default"}


@pytest.mark.parametrize("op", ["cached_attention", "latent_attention"])
def test_cached_rows_learn_as_eager_calls_do(op: str) -> None:
    function, inputs = getattr(ops, op), {"cached_attention": cached, "latent_attention": latent}[op](9)
    n = 3 if op == "cached_attention" else 4
    got, want = (run(f, list(inputs[:n]), inputs[n:]) for f in (compiled(function)[0], function))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@torch.no_grad()
def test_packed_products_are_nodes(kind: Any) -> None:
    one, bias = pack_weight(normal(40, 64), kind), normal(40, seed=1)
    first, second = pack_weight(normal(3, 64, 64, seed=2), kind), pack_weight(normal(3, 64, 32, seed=3), kind)
    linear, seen = compiled(lambda x: ops.packed_linear(x, one, bias), dynamic=True)
    mixture, seen_too = compiled(lambda *x: ops.packed_experts(x[0], first, second, *x[1:]), dynamic=True)
    for T in (3, 5):
        x, experts = normal(T, 64, seed=4), torch.arange(2 * T).view(T, 2) % 3
        equal([linear(x)], [ops.packed_linear(x, one, bias)])
        weights = normal(T, 2, seed=5)
        equal([mixture(x, experts, weights)], [ops.packed_experts(x, first, second, experts, weights)])
    assert nodes(seen.fw_graphs[0]) == {"nautile.packed_linear.default"}
    assert nodes(seen_too.fw_graphs[0]) == {"nautile.packed_experts.default"}
