"""Inputs for every op: odd sizes and the shapes where kernels break."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import Tensor

from nautile.ops.dispatch import TABLE


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Callable[[torch.Generator], tuple]
    """float64 arguments of the op, made from a generator."""

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def skip_unless_it_takes(op: str, backend: str, dtype: torch.dtype) -> None:
    """Kernels for a GPU refuse float64, which is there to judge the rest."""
    reason = import_module(f"nautile.ops.{backend}.{TABLE[op][0]}").why_not(torch.device("cpu"), dtype)
    if reason is not None:
        pytest.skip(f"{op}, {backend}: {reason}")


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def attention(
    B: int, S: int, H: int, Q: int, V: int, documents: list[int] | None = None, strided: bool = False, G: int = 0
):
    def make(generator: torch.Generator) -> tuple:
        q, k, v = (normal(generator, B, S, heads, size) for heads, size in ((H, Q), (G or H, Q), (G or H, V)))
        if strided:
            q, v = q.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([v, v], -1)[..., ::2]
        ids = None
        if documents:
            ids = torch.bucketize(torch.arange(B * S), torch.tensor(documents), right=True).view(B, S)
        return q, k, v, 0.7 * Q**-0.5, ids

    return make


def over_rows(S: int, H: int, G: int, Q: int, V: int, starts: list[int], T: int, chosen: bool = False):
    """Sequences of S queries each, the first at starts[b]."""

    def make(generator: torch.Generator) -> tuple:
        B = len(starts)
        q, k, v = normal(generator, B, S, H, Q), normal(generator, B, T, G, Q), normal(generator, B, T, G, V)
        positions = torch.tensor(starts)[:, None] + torch.arange(S)
        selected = None
        if chosen:
            own = torch.arange(T) == positions[..., None]
            selected = own | (torch.rand(B, S, T, generator=generator) < 0.4)
        return q, k, v, positions, 0.7 * Q**-0.5, selected

    return make


def over_latents(S: int, H: int, C: int, R: int, starts: list[int], T: int):
    def make(generator: torch.Generator) -> tuple:
        B = len(starts)
        q, q_rope = normal(generator, B, S, H, C), normal(generator, B, S, H, R)
        positions = torch.tensor(starts)[:, None] + torch.arange(S)
        return q, q_rope, normal(generator, B, T, C), normal(generator, B, T, R), positions, 0.7 * (C + R) ** -0.5

    return make


def experts(T: int, D: int, F: int, E: int, K: int, chosen: Callable | None = None, strided: bool = False):
    def make(generator: torch.Generator) -> tuple:
        if chosen is None:
            choice = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
        else:
            choice = chosen(T, K)
        x, weights = normal(generator, T, D), normal(generator, T, K)
        if strided:
            x, weights, choice = normal(generator, D, T).t(), normal(generator, K, T).t(), choice.t().contiguous().t()
        return x, normal(generator, E, 2 * F, D) / D**0.5, normal(generator, E, D, F) / F**0.5, choice, weights

    return make


def pair(*shape: int, strided: bool = False):
    def make(generator: torch.Generator) -> tuple:
        if strided:
            both = normal(generator, *shape[:-1], 2 * shape[-1])
            return both[..., : shape[-1]], both[..., shape[-1] :]
        return normal(generator, *shape), normal(generator, *shape)

    return make


def norm(*shape: int, strided: bool = False, size: float = 1.0):
    def make(generator: torch.Generator) -> tuple:
        x = size * (normal(generator, *shape[:-1], shape[-1] + 3)[..., 2:-1] if strided else normal(generator, *shape))
        return x, normal(generator, shape[-1]), 1e-6

    return make


def rotation(B: int, S: int, H: int, R: int, strided: bool = False):
    def make(generator: torch.Generator) -> tuple:
        x = normal(generator, B, S, H, R + 5)[..., 5:] if strided else normal(generator, B, S, H, R)
        angle = normal(generator, B, S, R // 2)
        return x, angle.cos(), angle.sin()

    return make


def loss(T: int, D: int, V: int, chunk: int, ignored: tuple[int, ...] = (), size: float = 1.0, strided: bool = False):
    def make(generator: torch.Generator) -> tuple:
        targets = torch.randint(0, V, (T,), generator=generator)
        targets[list(ignored)] = -100
        x = normal(generator, D, T).t() if strided else normal(generator, T, D)
        return size * x, normal(generator, V, D), targets, chunk

    return make


def projection(*shape: int, out: int, bias: bool = False, strided: bool = False):
    def make(generator: torch.Generator) -> tuple:
        x = normal(generator, *shape[:-1], 2 * shape[-1])[..., ::2] if strided else normal(generator, *shape)
        weight = normal(generator, shape[-1], out).t() if strided else normal(generator, out, shape[-1])
        return x, weight / shape[-1] ** 0.5, normal(generator, out) if bias else None

    return make


def gated(*shape: int, out: int, strided: bool = False):
    def make(generator: torch.Generator) -> tuple:
        x, gate, _ = projection(*shape, out=out, strided=strided)(generator)
        return x, gate, normal(generator, *gate.shape) / shape[-1] ** 0.5

    return make


def one_expert(T: int, K: int) -> Tensor:
    return torch.full((T, K), 2)


def without_expert_zero(T: int, K: int) -> Tensor:
    return (torch.arange(T)[:, None] + torch.arange(K)) % 3 + 1


CASES = [
    Case("causal_attention", "odd", attention(2, 13, 3, 6, 5)),
    Case("causal_attention", "one-token", attention(1, 1, 2, 4, 3)),
    Case("causal_attention", "several-blocks", attention(1, 140, 1, 4, 6)),
    Case("causal_attention", "documents", attention(2, 11, 2, 4, 3, documents=[0, 4, 5, 11, 17, 22])),
    Case("causal_attention", "documents-over-blocks", attention(1, 131, 1, 4, 3, documents=[0, 126, 129, 131])),
    Case("causal_attention", "strided", attention(2, 9, 2, 5, 4, strided=True)),
    Case("causal_attention", "grouped", attention(2, 13, 6, 4, 5, G=3)),
    Case("causal_attention", "grouped-equal-widths", attention(2, 13, 6, 4, 4, G=2)),
    Case("causal_attention", "grouped-one-key-head", attention(2, 9, 3, 5, 4, G=1)),
    Case("causal_attention", "grouped-several-blocks", attention(2, 140, 4, 4, 6, G=2)),
    Case("causal_attention", "grouped-documents", attention(2, 11, 4, 4, 3, documents=[0, 4, 5, 11, 17, 22], G=2)),
    Case("causal_attention", "grouped-documents-over-blocks", attention(1, 131, 2, 4, 4, [0, 126, 129, 131], G=1)),
    Case("causal_attention", "grouped-strided", attention(2, 9, 4, 5, 4, strided=True, G=2)),
    Case("cached_attention", "odd", over_rows(5, 6, 3, 4, 7, [9, 2], 17)),
    Case("cached_attention", "from-start", over_rows(13, 3, 3, 6, 5, [0], 13)),
    Case("cached_attention", "one-token", over_rows(1, 4, 2, 4, 4, [7], 8)),
    Case("cached_attention", "one-token-ragged", over_rows(1, 4, 1, 4, 4, [7, 0, 3], 9)),
    Case("cached_attention", "several-blocks", over_rows(140, 2, 1, 4, 3, [11], 160)),
    Case("cached_attention", "selected", over_rows(5, 4, 2, 4, 7, [9, 2], 17, chosen=True)),
    Case("cached_attention", "selected-several-blocks", over_rows(140, 2, 2, 4, 3, [11], 151, chosen=True)),
    Case("latent_attention", "odd", over_latents(5, 3, 7, 4, [9, 2], 17)),
    Case("latent_attention", "one-token", over_latents(1, 3, 7, 4, [16], 17)),
    Case("latent_attention", "one-token-ragged", over_latents(1, 3, 7, 4, [16, 0, 5], 18)),
    Case("latent_attention", "from-start", over_latents(13, 3, 7, 4, [0], 13)),
    Case("grouped_swiglu", "odd", experts(19, 7, 5, 6, 3)),
    Case("grouped_swiglu", "filled-up-rows", experts(70, 5, 3, 3, 2)),
    Case("grouped_swiglu", "filled-up-rows-empty-expert", experts(90, 5, 3, 4, 3, without_expert_zero)),
    Case("grouped_swiglu", "empty-experts", experts(9, 4, 3, 8, 2, without_expert_zero)),
    Case("grouped_swiglu", "all-to-one", experts(7, 6, 4, 5, 1, one_expert)),
    Case("grouped_swiglu", "same-expert-twice", experts(5, 6, 4, 5, 2, one_expert)),
    Case("grouped_swiglu", "no-tokens", experts(0, 6, 4, 5, 2, one_expert)),
    Case("grouped_swiglu", "one-token", experts(1, 6, 4, 5, 2)),
    Case("grouped_swiglu", "strided", experts(11, 6, 4, 5, 2, strided=True)),
    Case("grouped_swiglu", "many-rows", experts(90, 5, 3, 3, 2)),
    Case("linear", "odd", projection(37, 5, out=7)),
    Case("linear", "bias", projection(2, 19, 5, out=7, bias=True)),
    Case("linear", "few-rows", projection(3, 5, out=7, bias=True)),
    Case("linear", "no-rows", projection(0, 5, out=7)),
    Case("linear", "strided", projection(33, 6, out=5, strided=True)),
    Case("gated_linear", "odd", gated(37, 5, out=7)),
    Case("gated_linear", "three-dimensions", gated(2, 19, 5, out=7)),
    Case("gated_linear", "few-rows", gated(3, 5, out=7)),
    Case("gated_linear", "no-rows", gated(0, 5, out=7)),
    Case("gated_linear", "strided", gated(33, 6, out=5, strided=True)),
    Case("swiglu", "odd", pair(5, 7)),
    Case("swiglu", "three-dimensions", pair(2, 3, 5)),
    Case("swiglu", "empty", pair(0, 7)),
    Case("swiglu", "halves-of-one-tensor", pair(6, 5, strided=True)),
    Case("rms_norm", "odd", norm(5, 7)),
    Case("rms_norm", "four-dimensions", norm(2, 3, 2, 9)),
    Case("rms_norm", "tiny-values", norm(3, 5, size=1e-4)),
    Case("rms_norm", "strided", norm(4, 6, strided=True)),
    Case("rotate_interleaved", "odd", rotation(2, 5, 3, 6)),
    Case("rotate_interleaved", "one-pair", rotation(1, 3, 1, 2)),
    Case("rotate_interleaved", "strided", rotation(2, 3, 2, 8, strided=True)),
    Case("rotate_half_split", "odd", rotation(2, 5, 3, 6)),
    Case("rotate_half_split", "one-pair", rotation(1, 3, 1, 2)),
    Case("rotate_half_split", "strided", rotation(2, 3, 2, 8, strided=True)),
    Case("linear_cross_entropy", "odd", loss(11, 5, 13, chunk=4)),
    Case("linear_cross_entropy", "one-chunk", loss(7, 5, 13, chunk=64)),
    Case("linear_cross_entropy", "several-row-blocks", loss(150, 3, 5, chunk=149)),
    Case("linear_cross_entropy", "ignored", loss(9, 5, 13, chunk=4, ignored=(0, 3, 8))),
    Case("linear_cross_entropy", "all-ignored", loss(5, 4, 7, chunk=2, ignored=tuple(range(5)))),
    Case("linear_cross_entropy", "huge-logits", loss(6, 5, 13, chunk=4, size=100.0)),
    Case("linear_cross_entropy", "strided", loss(9, 5, 13, chunk=4, strided=True)),
]
