"""Triton's attention compiled, on a GPU, against the specification: shapes of models, forward, backward, and bits."""

import pytest
import torch
from torch import Tensor

from nautile import ops
from nautile.ops.numerics import MLA_PREFILL_LSE, MLA_PREFILL_OUT, within

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
BF16 = torch.bfloat16


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.randn(*shape, device="cuda") / 3).to(dtype)


def run(backend: str, op, tensors: tuple[Tensor, ...], *rest) -> list[Tensor]:
    """Outputs, then gradients; the reference from the same numbers in float32."""
    wide = backend == "reference"
    leaves = [(x.float() if wide else x.detach().clone()).requires_grad_() for x in tensors]
    with ops.use(backend):
        got = op(*leaves, *rest)
    outs = got if isinstance(got, tuple) else (got,)
    upstream = torch.randn(outs[0].shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs[0], leaves, upstream.to(outs[0].dtype))]


def assert_gradients(got: list[Tensor], want: list[Tensor], tolerance: float = 0.01) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        assert (a.float() - b).norm() <= tolerance * b.norm()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize(
    ("S", "H", "G", "Q", "V"),
    [(1000, 16, 16, 192, 128), (513, 8, 2, 128, 128), (700, 6, 6, 64, 64), (130, 4, 1, 256, 256), (257, 3, 3, 96, 80)],
)
def test_causal_attention(S: int, H: int, G: int, Q: int, V: int, documented: bool) -> None:
    inputs = normal(2, S, H, Q), normal(2, S, G, Q), normal(2, S, G, V)
    ids = None
    if documented:
        starts = torch.tensor([0, 3, S // 3, S, S + 70], device="cuda")
        ids = torch.bucketize(torch.arange(2 * S, device="cuda"), starts, right=True).view(2, S)
    got, again, want = (run(b, ops.causal_attention, inputs, Q**-0.5, ids) for b in ("triton", "triton", "reference"))
    assert within(got[0], want[0], MLA_PREFILL_OUT) is None
    assert_gradients(got[1:], want[1:])
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_causal_attention_in_float32() -> None:
    inputs = tuple(normal(1, 150, heads, width, dtype=torch.float32) for heads, width in ((4, 192), (2, 192), (2, 128)))
    got, want = (run(b, ops.causal_attention, inputs, 192**-0.5) for b in ("triton", "reference"))
    assert_gradients(got, want, 1e-4)


def test_selected_attention() -> None:
    inputs = normal(2, 700, 8, 192), normal(2, 700, 8, 192), normal(2, 700, 8, 128)
    selected = torch.rand(2, 700, 700, device="cuda") < 0.2
    selected |= torch.eye(700, dtype=torch.bool, device="cuda")
    got, want = (run(b, ops.selected_attention, inputs, selected, 192**-0.5) for b in ("triton", "reference"))
    assert within(got[0], want[0], MLA_PREFILL_OUT) is None
    assert_gradients(got[1:], want[1:])


def named_rows(S: int, T: int, K: int, unnamed: int) -> Tensor:
    """K of the first T − unnamed rows, each at most once; wild numbers where there are too few."""
    order = torch.rand(S, max(K, T - unnamed), device="cuda").argsort(-1)[:, :K]
    wild = torch.tensor([-(2**31), -5, -1, T, 2**31 - 1], device="cuda")
    return torch.where(order < T - unnamed, order, wild[order % 5]).int()


SPARSE = [(33, 128, 700, 256), (62, 64, 100, 200), (17, 16, 300, 65), (3, 5, 9, 4)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("S", "H", "T", "K"), SPARSE)
def test_sparse_prefill(S: int, H: int, T: int, K: int, deterministic: bool) -> None:
    rows = named_rows(S, T, K, unnamed=3)
    lengths = torch.randint(0, K + 3, (S,), device="cuda", dtype=torch.int32)
    sink = torch.randn(H, device="cuda")
    sink[:2] = torch.tensor([float("inf"), float("-inf")])
    q, kv = normal(S, H, 576), normal(T, 576)
    kv[-3:] = float("nan")

    def op(q: Tensor, kv: Tensor, sink: Tensor) -> tuple[Tensor, ...]:
        return ops.sparse_mla_prefill(q, kv, rows, 576**-0.5, 512, sink, lengths)

    torch.use_deterministic_algorithms(deterministic)
    try:
        got, again = (run("triton", op, (q, kv, sink)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    want = run("reference", op, (q, kv, sink))
    assert within(got[0], want[0], MLA_PREFILL_OUT) is None
    assert within(got[1], want[1], MLA_PREFILL_LSE) is None
    assert within(got[2], want[2], MLA_PREFILL_LSE) is None
    assert_gradients(got[3:], want[3:])
    same = got if deterministic else got[:4]  # outputs and dq always; dkv only when told to
    assert all(torch.equal(a, b) for a, b in zip(same, again[: len(same)], strict=True))


def test_gathered_attention() -> None:
    rows = torch.stack([named_rows(20, 400, 150, unnamed=0).long().clamp(min=-1) for _ in range(2)])
    rows[rows >= 400] = -1
    inputs = normal(2, 20, 32, 512), normal(2, 20, 32, 64), normal(2, 400, 512), normal(2, 400, 64)
    got, want = (run(b, ops.gathered_attention, inputs, rows, 576**-0.5) for b in ("triton", "reference"))
    assert within(got[0], want[0], MLA_PREFILL_OUT) is None
    assert_gradients(got[1:], want[1:])
