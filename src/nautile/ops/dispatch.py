"""Which implementation of an op runs, and why: a table to read, not a registry to search.

An implementation is a module ``ops/<backend>/<topic>.py`` with a function of the op's name and
``why_not(device, dtype) -> str | None``; the package ``ops/<backend>`` has ``unavailable(device) -> str | None``, which
is asked first. The first backend of the op's row without a reason wins. ``NAUTILE_OPS=reference`` or
``with ops.use("reference")`` forces one, for the ops that have it in their row.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from nautile.core.errors import UserError

TABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    # op: (topic, backends, fastest first)
    "causal_attention": ("attention", ("triton", "cpu", "reference")),
    "cached_attention": ("cached", ("cpu", "reference")),
    "latent_attention": ("cached", ("cpu", "reference")),
    "grouped_swiglu": ("experts", ("cpu", "reference")),
    "linear": ("projection", ("cpu", "reference")),
    "gated_linear": ("projection", ("cpu", "reference")),
    "packed_linear": ("packed", ("cpu", "reference")),
    "packed_experts": ("packed_mixture", ("cpu", "reference")),
    "swiglu": ("activation", ("cpu", "reference")),
    "rms_norm": ("norm", ("cpu", "reference")),
    "rotate_interleaved": ("rotary", ("cpu", "reference")),
    "rotate_half_split": ("rotary", ("cpu", "reference")),
    "linear_cross_entropy": ("cross_entropy", ("cpu", "reference")),
    "index_scores": ("indexer", ("triton", "cpu", "reference")),
    "top_rows": ("indexer", ("triton", "cpu", "reference")),
    "indexer_kl": ("indexer_loss", ("triton", "cpu", "reference")),
    "paged_mqa_logits": ("index_logits", ("triton", "reference")),
    "mqa_logits": ("index_logits", ("triton", "reference")),
    "gathered_attention": ("sparse_attention", ("triton", "cpu", "reference")),
    "selected_attention": ("sparse_attention", ("triton", "cpu", "reference")),
    "sparse_mla_prefill": ("sparse_prefill", ("triton", "cpu", "reference")),
    "paged_mla_decode": ("paged_latents", ("hopper", "triton", "cpu", "reference")),
    "paged_sparse_mla_decode": ("paged_sparse_latents", ("triton", "reference")),
    "plan_splits": ("split_plan", ("triton", "reference")),
    "store_latents": ("latent_bytes", ("triton", "reference")),
    "fp8_gemm": ("fp8_products", ("hopper", "triton", "reference")),
    "grouped_fp8_gemm": ("fp8_products", ("hopper", "triton", "reference")),
    "masked_fp8_gemm": ("fp8_products", ("hopper", "triton", "reference")),
    "k_grouped_fp8_gemm": ("fp8_products", ("hopper", "triton", "reference")),
    "grouped_gemm": ("grouped_products", ("triton", "reference")),
    "masked_gemm": ("grouped_products", ("triton", "reference")),
    "k_grouped_gemm": ("grouped_products", ("triton", "reference")),
    "quantize_fp8": ("quantization", ("triton", "reference")),
    "requantize_transposed": ("quantization", ("triton", "reference")),
    "dequantize_fp8": ("quantization", ("triton", "reference")),
    "swiglu_quantize": ("swiglu_quantization", ("triton", "reference")),
    "swiglu_quantize_backward": ("swiglu_quantization", ("triton", "reference")),
    "topk_gate": ("routing", ("triton", "cpu", "reference")),
    "permute_tokens": ("routing", ("triton", "reference")),
    "combine_tokens": ("routing", ("triton", "reference")),
    "mn_major_scales": ("scale_packing", ("triton", "reference")),
    "quantize_e5m6": ("e5m6", ("triton", "reference")),
    "dequantize_e5m6": ("e5m6", ("triton", "reference")),
}
ON_FP8 = {
    *("fp8_gemm", "grouped_fp8_gemm", "masked_fp8_gemm", "k_grouped_fp8_gemm"),
    *("dequantize_fp8", "requantize_transposed", "mqa_logits", "paged_mqa_logits"),
}
"""Ops whose deciding operand is float8_e4m3fn."""
BACKENDS = ("hopper", "triton", "cpu", "reference")
NOTHING = "nothing"
"""Stands for the backend of an op that cannot run."""

_forced: ContextVar[str | None] = ContextVar("nautile_ops_backend", default=None)


@dataclass(frozen=True)
class Choice:
    """What the table gives for one op on one device and dtype."""

    op: str
    backend: str
    """The backend that runs; "nothing" if the forced one cannot."""
    passed_over: dict[str, str]
    """Faster backend → why it does not run."""


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op inside the block on `backend`; ops that do not have it in their row run as they would anyway.

    Raises:
        UserError: No backend of that name, or (when an op is called) it cannot run here.
    """
    token = _forced.set(_known(backend))
    try:
        yield
    finally:
        _forced.reset(token)


def implementation(op: str, example: torch.Tensor) -> Callable[..., Any]:
    """The function that runs `op` for tensors like `example`; where torch.compile traces, its reference.

    Ops for which inlined torch would be slow or large do not ask while traced: they put a node into the graph, which
    asks when it runs.
    """
    if torch.compiler.is_compiling():
        return _REFERENCE[op]
    return _function(op, example.device, example.dtype, forced_backend())


def backend_for(op: str, example: torch.Tensor) -> str:
    """Name of the backend that runs `op` for tensors like `example`."""
    return _backend(op, example.device, example.dtype, forced_backend())


def choices(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> list[Choice]:
    """One row per op: the backend that would run on `device` for `dtype`, and why faster ones would not.

    Ops of `ON_FP8` are asked for float8_e4m3fn.
    """
    place, forced = torch.device(device), forced_backend()
    return [_choose(op, place, torch.float8_e4m3fn if op in ON_FP8 else dtype, forced) for op in TABLE]


def summary(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """One line for a run's log: how many ops each backend serves there, and where to read why."""
    served: dict[str, int] = {}
    for choice in choices(device, dtype):
        served[choice.backend] = served.get(choice.backend, 0) + 1
    counts = ", ".join(f"{served[backend]} {backend}" for backend in (*BACKENDS, NOTHING) if backend in served)
    forced = forced_backend()
    return f"kernels on {device}: {counts}" + (f" ({forced} is forced)" if forced else " (nautile ops says why)")


def forced_backend() -> str | None:
    """The backend that ``use`` or ``NAUTILE_OPS`` asks for; None when the table decides."""
    forced = _forced.get() or os.environ.get("NAUTILE_OPS")
    return _known(forced) if forced else None


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise UserError(
            f"no ops backend is called {backend!r}",
            "NAUTILE_OPS and ops.use() name a folder of nautile/ops",
            f"choose one of: {', '.join(BACKENDS)}",
        )
    return backend


@cache
def _function(op: str, device: torch.device, dtype: torch.dtype, forced: str | None) -> Callable[..., Any]:
    return getattr(_module(op, _backend(op, device, dtype, forced)), op)


def _backend(op: str, device: torch.device, dtype: torch.dtype, forced: str | None) -> str:
    choice = _choose(op, device, dtype, forced)
    if choice.backend == NOTHING:
        raise UserError(
            f"{op} has no backend for {dtype} on {device}",
            "; ".join(f"{backend}: {reason}" for backend, reason in choice.passed_over.items()),
            "unset NAUTILE_OPS, or move the tensors to a device and dtype that a backend accepts",
        )
    return choice.backend


@cache
def _choose(op: str, device: torch.device, dtype: torch.dtype, forced: str | None) -> Choice:
    _, backends = TABLE[op]
    passed_over: dict[str, str] = {}
    for backend in backends:
        if forced in backends and backend != forced:
            passed_over[backend] = f"{forced} is forced"
            continue
        reason = _why_not(op, backend, device, dtype)
        if reason is None:
            return Choice(op, backend, passed_over)
        passed_over[backend] = reason
    return Choice(op, NOTHING, passed_over)


def _why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The package is asked first: a backend that is not there at all need not be imported to say so."""
    absent = import_module(f"nautile.ops.{backend}").unavailable(device)
    return absent if absent is not None else _module(op, backend).why_not(device, dtype)


def _module(op: str, backend: str) -> ModuleType:
    topic, _ = TABLE[op]
    return import_module(f"nautile.ops.{backend}.{topic}")


_REFERENCE = {op: getattr(_module(op, "reference"), op) for op in TABLE}
"""Looked up by torch.compile, which traces neither imports nor context variables."""
