"""Attention to chosen rows as nodes of a compiler's graph, which run what eager calls do, forward and backward.

Traced instead, their references would be inlined, which gather a latent for every query and place at once. The
backward is the backend's own, after its forward once more: nodes keep inputs only. `dtype` is the compute dtype, since
compiled code runs its nodes without autocast. Dims as in `sparse_attention` and `sparse_prefill`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nautile.ops.dispatch import implementation
from nautile.ops.precision import accumulate_dtype


def as_if(x: Tensor, dtype: torch.dtype) -> torch.autocast:
    """The autocast under which an eager call computes in `dtype`."""
    lowered = dtype != x.dtype
    return torch.autocast(x.device.type, dtype if lowered else None, enabled=lowered)


@torch.library.custom_op("nautile::gathered_attention", mutates_args=())
def gathered_node(
    q_BSHC: Tensor,
    q_rope_BSHR: Tensor,
    c_BTC: Tensor,
    k_rope_BTR: Tensor,
    rows_BSK: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """See `nautile.ops.gathered_attention`."""
    tensors = [q_BSHC, q_rope_BSHR, c_BTC, k_rope_BTR, rows_BSK]
    return _run("gathered_attention", tensors, scale, 0, dtype)[0].contiguous()


@gathered_node.register_fake
def _(
    q_BSHC: Tensor,
    q_rope_BSHR: Tensor,
    c_BTC: Tensor,
    k_rope_BTR: Tensor,
    rows_BSK: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return q_BSHC.new_empty(q_BSHC.shape, dtype=dtype)


@torch.library.custom_op("nautile::selected_attention", mutates_args=())
def selected_node(
    q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, selected_BSS: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """See `nautile.ops.selected_attention`."""
    tensors = [q_BSHQ, k_BSHQ, v_BSHV, selected_BSS]
    return _run("selected_attention", tensors, scale, 0, dtype)[0].contiguous()


@selected_node.register_fake
def _(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, selected_BSS: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return q_BSHQ.new_empty(v_BSHV.shape, dtype=dtype)


@torch.library.custom_op("nautile::sparse_mla_prefill", mutates_args=())
def prefill_node(
    q_SHX: Tensor,
    kv_TX: Tensor,
    rows_SK: Tensor,
    sink_H: Tensor | None,
    topk_length_S: Tensor | None,
    scale: float,
    v_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `nautile.ops.sparse_mla_prefill`."""
    tensors = [q_SHX, kv_TX, rows_SK, sink_H, topk_length_S]
    out = _run("sparse_mla_prefill", tensors, scale, v_dim, dtype)
    return tuple(x.contiguous() for x in out)  # pyrefly: ignore


@prefill_node.register_fake
def _(
    q_SHX: Tensor,
    kv_TX: Tensor,
    rows_SK: Tensor,
    sink_H: Tensor | None,
    topk_length_S: Tensor | None,
    scale: float,
    v_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    S, H, _ = q_SHX.shape
    statistics = (q_SHX.new_empty(S, H, dtype=accumulate_dtype(q_SHX)) for _ in range(2))
    return q_SHX.new_empty(S, H, v_dim, dtype=dtype), *statistics  # pyrefly: ignore


@torch.library.custom_op("nautile::sparse_attention_backward", mutates_args=())
def backward_node(
    op: str,
    tensors: list[Tensor | None],
    wanted: list[int],
    scale: float,
    v_dim: int,
    dtype: torch.dtype,
    grad: Tensor,
) -> list[Tensor]:
    """Gradients of those `tensors` whose numbers are `wanted`, of the arguments of `op`."""
    leaves = [None if x is None else x.detach() for x in tensors]
    inputs = [x.requires_grad_() for i, x in enumerate(leaves) if i in wanted and x is not None]
    # A node runs below autograd, which has to see what the backend does.
    below, included = torch._C._dispatch_tls_local_exclude_set(), torch._C._dispatch_tls_local_include_set()
    for key in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        below = below.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(included, below), torch.enable_grad():
        out = _run(op, leaves, scale, v_dim, dtype)[0]
        grads = torch.autograd.grad(out, inputs, grad)
    # Its own memory each, as the fake says: some backends return parts of one tensor.
    return [g.clone(memory_format=torch.contiguous_format) for g in grads]


@backward_node.register_fake
def _(
    op: str,
    tensors: list[Tensor | None],
    wanted: list[int],
    scale: float,
    v_dim: int,
    dtype: torch.dtype,
    grad: Tensor,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (tensors[i] for i in wanted) if x is not None]


def _run(op: str, tensors: Sequence[Tensor | None], scale: float, v_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What an eager call runs, its tensors first."""
    q = tensors[0]
    assert q is not None
    with as_if(q, dtype):
        if op == "sparse_mla_prefill":
            return implementation(op, q)(*tensors[:3], scale, v_dim, *tensors[3:])
        return (implementation(op, q)(*tensors, scale),)


def _differentiable(node: Any, op: str, tensors: int) -> None:
    """Register the backward of `node`, whose first so many arguments are tensors."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.rest = inputs[tensors:]
        if op == "sparse_mla_prefill":
            ctx.mark_non_differentiable(*output[1:])

    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        scale, v_dim, dtype = ctx.rest if len(ctx.rest) == 3 else (ctx.rest[0], 0, ctx.rest[1])
        wanted = [i for i in range(tensors) if ctx.needs_input_grad[i]]
        grads = backward_node(op, list(ctx.saved_tensors), wanted, scale, v_dim, dtype, grad)
        found: dict[int, Tensor] = dict(zip(wanted, grads, strict=True))
        return *(found.get(i) for i in range(tensors)), *(None,) * len(ctx.rest)

    node.register_autograd(backward, setup_context=keep)


_differentiable(gathered_node, "gathered_attention", 5)
_differentiable(selected_node, "selected_attention", 4)
_differentiable(prefill_node, "sparse_mla_prefill", 5)
