"""Attention over a cache: sequence by sequence and in blocks, rows that nobody may read, memory, narrow scores."""

import ops_naive as naive
import pytest
import torch
from ops_cases import CASES, Case, normal, over_latents, over_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nautile import ops
from nautile.ops.cpu import cached as cpu_cached
from nautile.ops.dispatch import TABLE

OVER_A_CACHE = [case for case in CASES if case.op in ("cached_attention", "latent_attention")]
BACKENDS = TABLE["cached_attention"][1]


@pytest.mark.parametrize("buffer", [1, 600, 4 << 20])
@pytest.mark.parametrize("case", OVER_A_CACHE, ids=str)
def test_any_blocks_give_the_same(case: Case, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_cached, "_FEW", 0)
    monkeypatch.setattr(cpu_cached, "_BUFFER", buffer)
    arguments = case.make(torch.Generator().manual_seed(0))
    got = getattr(ops, case.op)(*arguments)
    torch.testing.assert_close(got, getattr(naive, case.op)(*arguments), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("few", [0, 1 << 15])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", OVER_A_CACHE, ids=str)
def test_rows_past_a_sequence_may_hold_anything(
    case: Case, backend: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_cached, "_FEW", few)
    arguments = list(case.make(torch.Generator().manual_seed(0)))
    at, rows = (3, (1, 2)) if case.op == "cached_attention" else (4, (2, 3))
    want = getattr(ops, case.op)(*arguments)
    for i in rows:
        arguments[i] = arguments[i].clone()
        for b, last in enumerate(arguments[at].amax(1).tolist()):
            arguments[i][b, last + 1 :] = float("nan")
    with ops.use(backend):
        torch.testing.assert_close(getattr(ops, case.op)(*arguments), want, atol=1e-11, rtol=1e-11)


def test_later_rows_of_the_same_block_weigh_nothing() -> None:
    """The negative control of the causal mask within a chunk."""
    q, k, v, positions, scale, _ = over_rows(5, 2, 2, 4, 3, [6], 11)(torch.Generator().manual_seed(0))
    want = ops.cached_attention(q, k, v, positions, scale)
    k[:, 9:] += 5.0
    got = ops.cached_attention(q, k, v, positions, scale)
    torch.testing.assert_close(got[:, :3], want[:, :3], atol=0, rtol=0)
    assert (got[:, 3:] - want[:, 3:]).abs().max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_sequence_is_causal_attention(backend: str) -> None:
    q, k, v = normal_float(1, 37, 4, 6), normal_float(1, 37, 2, 6), normal_float(1, 37, 2, 5)
    positions = torch.arange(37)[None]
    with ops.use(backend):
        torch.testing.assert_close(
            ops.cached_attention(q, k, v, positions, 0.4), ops.causal_attention(q, k, v, 0.4), atol=1e-5, rtol=1e-5
        )


def test_memory_does_not_grow_with_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that the twin makes stays at its buffer, a hundredth of all scores."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    S, T, H = 512, 4096, 32
    q, k, v = normal_float(1, S, H, 8), normal_float(1, T, H, 8), normal_float(1, T, H, 8)
    with torch.inference_mode(), Watch():
        ops.cached_attention(q, k, v, torch.arange(T - S, T)[None], 0.3)
        ops.latent_attention(q, q, k[:, :, 0], k[:, :, 0], torch.arange(T - S, T)[None], 0.3)
    assert largest <= 8 << 20 < S * T * H * 4 / 30


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["causal_attention", "cached_attention", "selected_attention"])
def test_float16_scores_do_not_overflow(op: str, backend: str) -> None:
    """Unscaled they are 128 · 30² = 115 200; the largest float16 is 65 504."""
    q = torch.full((1, 3, 1, 128), 30.0, dtype=torch.float16)
    v = normal_float(1, 3, 1, 4).half()
    more = {
        "causal_attention": (0.088,),
        "cached_attention": (torch.arange(3)[None], 0.088),
        "selected_attention": (torch.ones(1, 3, 3, dtype=torch.bool), 0.088),
    }[op]
    if backend == "cpu":
        q, v = q.bfloat16(), v.bfloat16()
    with ops.use(backend):
        got = getattr(ops, op)(q, q, v, *more)
    want = torch.stack([v[:, : i + 1].float().mean(1) for i in range(3)], 1)
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("op", ["latent_attention", "gathered_attention"])
def test_float16_scores_over_latents_do_not_overflow(op: str) -> None:
    q = torch.full((1, 2, 3, 128), 30.0, dtype=torch.float16)
    where = torch.arange(2)[None] if op == "latent_attention" else torch.tensor([[[0, -1], [0, 1]]])
    got = getattr(ops, op)(q, q[..., :4], q[:, :, 0], q[:, :, 0, :4], where, 0.088)
    torch.testing.assert_close(got, torch.full_like(got, 30.0))


WRONG = [
    (
        lambda: ops.cached_attention(ones(1, 2, 3, 4), ones(1, 5, 2, 4), ones(1, 5, 2, 4), at(1, 2), 1.0),
        "multiple of G",
    ),
    (lambda: ops.cached_attention(ones(1, 2, 2, 4), ones(1, 5, 2, 4), ones(1, 6, 2, 4), at(1, 2), 1.0), "v must"),
    (lambda: ops.cached_attention(*[ones(1, 2, 2, 4)] * 3, at(1, 3), 1.0), "positions must"),
    (lambda: ops.cached_attention(*[ones(1, 2, 2, 4)] * 3, ones(1, 2), 1.0), "int64"),
    (lambda: ops.cached_attention(*[ones(1, 2, 2, 4).long()] * 3, at(1, 2), 1.0), "floating"),
    (lambda: ops.cached_attention(*[ones(1, 2, 2, 4)] * 3, at(1, 2), 1.0, ones(1, 2, 2)), "boolean"),
    (lambda: latents(c=ones(1, 5, 3)), "q and c"),
    (lambda: latents(k_rope=ones(1, 5, 3)), "q_rope and k_rope"),
    (lambda: latents(positions=at(2, 2)), "positions must"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def latents(c=None, k_rope=None, positions=None) -> Tensor:
    q, q_rope, good_c, good_k_rope, where, scale = over_latents(2, 3, 4, 2, [3], 5)(torch.Generator().manual_seed(0))
    both = ((c, good_c), (k_rope, good_k_rope), (positions, where))
    one_of = (good if given is None else given for given, good in both)
    return ops.latent_attention(q, q_rope, *one_of, scale)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


def at(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def normal_float(*shape: int) -> Tensor:
    return normal(torch.Generator().manual_seed(sum(shape)), *shape).float()
