"""Expert selection and the rows of tokens against loops, on every backend, forward and backward."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops import group_layout
from nautile.ops.dispatch import TABLE
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.routing import RowMap, row_map

GATES = TABLE["topk_gate"][1]
MOVERS = TABLE["permute_tokens"][1]
NAN = float("nan")

pytest.importorskip("triton")


def selected(scores_E: list[float], k: int, n_group: int, topk_group: int, group_score: str) -> list[int]:
    """One token's choice, by sorting: Python's sort keeps the order of equal keys."""
    size = len(scores_E) // n_group
    groups = [sorted(scores_E[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
    value = [group[0] if group_score == "max" or topk_group == n_group else group[0] + group[1] for group in groups]
    kept = sorted(range(n_group), key=lambda g: -value[g])[:topk_group]
    allowed = [e for e in range(len(scores_E)) if e // size in kept]
    return sorted(allowed, key=lambda e: -scores_E[e])[:k]


@pytest.mark.parametrize("backend", GATES)
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize(
    ("T", "E", "k", "n_group", "topk_group"),
    [(5, 16, 3, 4, 2), (7, 20, 4, 5, 3), (3, 33, 33, 1, 1), (1, 160, 6, 8, 3), (2, 256, 8, 8, 4), (0, 8, 2, 4, 2)],
)
def test_selection(T: int, E: int, k: int, n_group: int, topk_group: int, group_score: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(E)
    apart = torch.randn(T, E, generator=generator)
    ties = torch.randint(-1, 2, (T, E), generator=generator) * -0.5  # zeros of both signs among them
    for scores in (apart, ties, apart.t().contiguous().t()):
        with ops.use(backend):
            got = ops.topk_gate(scores, k, n_group, topk_group, group_score)
        assert got.dtype == torch.int64
        assert got.tolist() == [selected(row, k, n_group, topk_group, group_score) for row in scores.tolist()]


def test_selection_in_float64() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 0.0]], dtype=torch.float64)
    assert ops.topk_gate(scores, 2).tolist() == [[1, 0]]


def some_experts(T: int, K: int, E: int, *, holes: bool = True) -> Tensor:
    """Different ones for each token; expert 1 is nobody's, and with holes some are of nobody."""
    generator = torch.Generator().manual_seed(T)
    experts = torch.rand(T, E, generator=generator).index_fill(1, torch.tensor(1), -1.0).argsort(1)[:, -K:]
    return torch.where(torch.rand(T, K, generator=generator) < 0.2, -1, experts) if holes else experts


@pytest.mark.parametrize("alignment", [1, 4, 16])
@pytest.mark.parametrize(("T", "K", "E"), [(9, 3, 5), (1, 1, 2), (0, 2, 3), (4, 2, 40)])
def test_rows_are_sorted_by_expert_and_aligned(T: int, K: int, E: int, alignment: int) -> None:
    experts_TK = some_experts(T, K, E) if T else torch.empty(0, K, dtype=torch.int64)
    rows = row_map(experts_TK, E, alignment)
    want, row_of, ends = [], {}, []
    for e in range(E):
        for choice, expert in enumerate(experts_TK.flatten().tolist()):
            if expert == e:
                row_of[choice] = len(want)
                want.append(choice)
        ends.append(len(want))
        want += [-1] * (-len(want) % alignment)
    R = len(rows.choice_R)
    assert R % alignment == 0
    assert T * K + E * (alignment - 1) >= R
    assert rows.choice_R.tolist() == want + [-1] * (R - len(want))
    assert rows.row_TK.flatten().tolist() == [row_of.get(choice, -1) for choice in range(T * K)]
    assert rows.counts_E.tolist() == [int((experts_TK == e).sum()) for e in range(E)]
    assert rows.ends_E.tolist() == ends
    assert rows.ends_E.dtype == torch.int32
    layout = group_layout.rows_of(rows.ends_E, R, alignment)
    by_choice = torch.cat([experts_TK.flatten(), torch.tensor([-1])])[rows.choice_R]
    assert torch.equal(layout.long(), by_choice)


def run(dtype: torch.dtype, K: int, alignment: int, *, weighted: bool) -> tuple[RowMap, list[Tensor]]:
    """Permuted, combined, and the gradients of tokens, rows and weights; padding and what it meets are NaN."""
    experts_TK = some_experts(11, K, 6)
    rows = row_map(experts_TK, 6, alignment)
    padding = rows.choice_R < 0
    generator = torch.Generator().manual_seed(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(11, 37, generator=generator).to(dtype).requires_grad_()
    y = torch.randn(len(padding), 37, generator=generator).to(dtype).masked_fill(padding[:, None], NAN).requires_grad_()
    weights = torch.rand(11, K, generator=generator).to(wide).masked_fill(experts_TK < 0, NAN).requires_grad_()
    permuted = ops.permute_tokens(x, rows)
    grad = torch.randn(permuted.shape, generator=generator).to(dtype).masked_fill(padding[:, None], NAN)
    permuted.backward(grad)
    combined = ops.combine_tokens(y, rows, weights if weighted else None)
    combined.backward(torch.randn(combined.shape, generator=generator).to(dtype))
    found = [permuted.detach(), combined.detach(), x.grad, y.grad]
    assert combined.dtype == y.grad.dtype == x.grad.dtype == dtype
    return rows, [*found, weights.grad] if weighted else found


@pytest.mark.parametrize("weighted", [False, True])
def test_moving_equals_loops(weighted: bool) -> None:
    """The reference in float64, against the definition in Python."""
    rows, (permuted, combined, dx, dy, *dw) = run(torch.float64, 3, 4, weighted=weighted)
    generator = torch.Generator().manual_seed(1)  # as `run` draws them
    x, R = torch.randn(11, 37, generator=generator).double(), len(rows.choice_R)
    y = torch.randn(R, 37, generator=generator).double()
    w = torch.rand(11, 3, generator=generator).double()
    d_permuted = torch.randn(R, 37, generator=generator).double()
    d_combined = torch.randn(11, 37, generator=generator).double()
    want = [torch.zeros(R, 37).double(), torch.zeros(11, 37).double(), torch.zeros(11, 37).double()]
    want += [torch.zeros(R, 37).double(), torch.zeros(11, 3).double()]
    for r, choice in enumerate(rows.choice_R.tolist()):
        if choice >= 0:
            t, k = divmod(choice, 3)
            factor = w[t, k] if weighted else 1.0
            want[0][r] = x[t]
            want[1][t] += factor * y[r]
            want[2][t] += d_permuted[r]
            want[3][r] = factor * d_combined[t]
            want[4][t, k] = d_combined[t] @ y[r]
    for got, expected in zip([permuted, combined, dx, dy, *dw], want, strict=False):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "K", "alignment", "weighted", "rounding"),
    [
        (torch.float32, 3, 4, True, 1e-5),
        (torch.bfloat16, 2, 1, True, 2**-7),
        (torch.float16, 5, 16, False, 2**-10),
        (torch.float32, 1, 1, False, 0.0),
    ],
)
def test_triton_moves_as_the_reference(
    dtype: torch.dtype, K: int, alignment: int, weighted: bool, rounding: float
) -> None:
    """Sums are added in another order, and rounded once."""
    found = []
    for backend in MOVERS:
        with ops.use(backend):
            found.append(run(dtype, K, alignment, weighted=weighted)[1])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=rounding, atol=1e-5 if rounding else 0.0)


@pytest.mark.parametrize("backend", MOVERS)
def test_strides_and_numbers_of_one_byte(backend: str) -> None:
    rows = row_map(some_experts(5, 2, 4, holes=False), 4, 4)
    x = torch.randn(5, 140, generator=torch.Generator().manual_seed(0))
    with ops.use(backend):
        want = ops.permute_tokens(x, rows)
        assert torch.equal(ops.permute_tokens(x.t().contiguous().t(), rows), want)
        turned = want.t().contiguous().t()
        assert torch.equal(ops.combine_tokens(turned, rows), ops.combine_tokens(want, rows))
        q = ops.quantize_fp8(x)
        moved = Fp8Tensor(ops.permute_tokens(q.data, rows), ops.permute_tokens(q.scale, rows), q.block)
    assert torch.equal(moved.dequantize(), ops.permute_tokens(q.dequantize(), rows))


@pytest.mark.parametrize("backend", MOVERS)
def test_gradients_of_tokens_are_added_in_the_order_of_their_choices(backend: str) -> None:
    """Bit for bit: of a sum in any order not even two runs agree, once torch has several threads."""
    rows, generator = row_map(some_experts(9, 5, 7, holes=False), 7, 4), torch.Generator().manual_seed(0)
    x, grad = torch.zeros(9, 33, requires_grad=True), torch.randn(len(rows.choice_R), 33, generator=generator)
    with ops.use(backend):
        ops.permute_tokens(x, rows).backward(grad)
    want = torch.zeros(9, 33)
    for row_T in rows.row_TK.unbind(1):
        want += grad[row_T]
    assert torch.equal(x.grad, want)


@pytest.mark.parametrize("backend", MOVERS)
def test_moving_nothing(backend: str) -> None:
    none = row_map(torch.empty(0, 2, dtype=torch.int64), 3, 4)
    nobody = row_map(torch.full((3, 2), -1), 3)
    with ops.use(backend):
        assert ops.permute_tokens(torch.empty(0, 5), none).shape == (0, 5)
        assert ops.combine_tokens(torch.empty(0, 5), none).shape == (0, 5)
        x_TD = torch.empty(0, 5, requires_grad=True)
        ops.combine_tokens(ops.permute_tokens(x_TD, none), none).sum().backward()
        assert x_TD.grad is not None, "tokens that are not there have a gradient of no rows"
        weights_TK = torch.empty(0, 2, requires_grad=True)
        ops.combine_tokens(torch.empty(0, 5), none, weights_TK).sum().backward()
        assert weights_TK.grad is not None, "nor do their weights fall out of the graph"
        assert ops.permute_tokens(torch.full((3, 5), NAN), nobody).tolist() == [[0.0] * 5] * 6
        assert ops.combine_tokens(torch.full((6, 5), NAN), nobody).tolist() == [[0.0] * 5] * 3


@pytest.mark.parametrize("weighted", [False, True])
def test_each_is_one_node_of_a_compiled_graph(weighted: bool) -> None:
    """Chosen, permuted and combined, forward and backward; NaN in padding rows and of choices of nobody."""

    def layer(x: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
        experts = ops.topk_gate(scores, 3, 4, 2, "top2_sum")
        rows = row_map(torch.where(experts == 5, -1, experts), 12, 4)
        y = ops.permute_tokens(x, rows).exp()
        y = torch.where(rows.choice_R[:, None] < 0, NAN, y)
        return ops.combine_tokens(y, rows, torch.where(experts == 5, NAN, weights) if weighted else None)

    generator = torch.Generator().manual_seed(0)
    found = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        generator.manual_seed(0)
        x, scores, weights = (torch.randn(9, n, generator=generator) for n in (7, 12, 3))
        y = function(x.requires_grad_(), scores, weights.requires_grad_())
        y.backward(torch.randn(y.shape, generator=generator))
        found.append([y.detach(), x.grad, *([weights.grad] if weighted else [])])
    for eager, compiled in zip(*found, strict=True):
        assert torch.isfinite(eager).all()
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    graphs = []
    torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph.forward)(
        x, scores, weights
    )
    for op in ("topk_gate", "permute_tokens", "combine_tokens"):
        assert graphs[0].count(f"torch.ops.nautile.{op}") == 1, op


def test_there_and_back_is_the_sum_of_weights() -> None:
    experts = some_experts(8, 3, 6, holes=False)
    rows = row_map(experts, 6, 8)
    x, weights = torch.randn(8, 16).double(), torch.rand(8, 3).double()
    back = ops.combine_tokens(ops.permute_tokens(x, rows), rows, weights)
    torch.testing.assert_close(back, x * weights.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: ops.topk_gate(torch.ones(4), 1),
            r"scores must be float32 or float64 \[T, E\], got torch.float32 \[4\]",
        ),
        (lambda: ops.topk_gate(torch.ones(2, 6), 1, 4, 2), "cannot choose 2 of 4 groups of 6 experts"),
        (lambda: ops.topk_gate(torch.ones(2, 6), 4, 3, 1), r"k must be in \[1, 2\]"),
        (lambda: ops.topk_gate(torch.ones(2, 6), 1, 6, 2, "top2_sum"), "groups of one expert"),
        (lambda: ops.topk_gate(torch.ones(2, 6), 1, 3, 2, "mean"), "group_score must be"),
        (lambda: row_map(torch.ones(2, 2), 3), r"experts must be int64 \[T, K\], got torch.float32"),
        (lambda: row_map(torch.full((2, 2), 3), 3), r"experts must lie in \[0, 3\), or be -1, got 3 to 3"),
        (lambda: row_map(torch.zeros(2, 2, dtype=torch.int64), 3, 0), "must be positive, got 3 and 0"),
        (lambda: ops.permute_tokens(torch.ones(3, 4), MAP), r"x must be \[T, D\] with T = 2, got \[3, 4\]"),
        (lambda: ops.combine_tokens(torch.ones(3, 4), MAP), r"y must be floats \[R, D\] with R = 4"),
        (
            lambda: ops.combine_tokens(torch.ones(4, 4), MAP, torch.ones(2, 2).double()),
            r"weights must be torch.float32 \[2, 2\], got torch.float64",
        ),
    ],
)
def test_what_they_refuse(call: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


MAP = row_map(torch.zeros(2, 2, dtype=torch.int64), 3)
