"""How one FP8 product is handed to fp8_gemm.cu: its tile, its arguments, and the boxes that the copy engine moves.

Pure functions of shapes, strides and addresses; nothing here needs a GPU. M, N, K, G as in `ops/fp8_products.py`.
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nautile.core.cuda_driver import Launch, TensorMap
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.hopper.tiles import Grouping, Problem, Share, Tile, band, choose, grid

SOURCE = Path(__file__).with_name("fp8_gemm.cu")
HEADERS = tuple(SOURCE.with_name(name) for name in ("fp8_tiles.cuh", "fp8_store.cuh", "ptx.cuh"))
KERNEL = "fp8_gemm"
BLOCK_K = 128


class Args(ctypes.Structure):
    """``struct Args`` of fp8_tiles.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scale_a", "scale_b", "layout", "c", "out")),
        *((name, ctypes.c_int64) for name in ("out_row", "out_group", "c_row", "c_group")),
        *((name, ctypes.c_int) for name in ("scale_a_row", "scale_a_k", "scale_a_group")),
        *((name, ctypes.c_int) for name in ("scale_b_row", "scale_b_k", "scale_b_group")),
        *((name, ctypes.c_int) for name in ("m", "n", "groups", "k", "band", "alignment")),
    )


@dataclass(frozen=True)
class Variant:
    """What fp8_gemm.cu is compiled with."""

    tile: Tile
    grouping: Grouping
    column_scales: bool
    out_bytes: int
    tile_store: bool
    add_c: bool

    def defines(self) -> dict[str, int]:
        """Its macros."""
        return {
            "BLOCK_M": self.tile.block_m,
            "BLOCK_N": self.tile.block_n,
            "STAGES": self.tile.stages,
            "SHARE": int(self.tile.share),
            "GROUPING": int(self.grouping),
            "COLUMN_SCALES": int(self.column_scales),
            "OUT_BYTES": self.out_bytes,
            "TILE_STORE": int(self.tile_store),
            "ADD_C": int(self.add_c),
        }


@dataclass(frozen=True)
class Plan:
    """One launch, complete."""

    variant: Variant
    maps: tuple[TensorMap, TensorMap, TensorMap]
    args: Args
    how: Launch


def plan(
    grouping: Grouping,
    a: Fp8Tensor,
    b: Fp8Tensor,
    out: Tensor,
    *,
    sms: int,
    layout: Tensor | None = None,
    c: Tensor | None = None,
    alignment: int = BLOCK_K,
    tile: Tile | None = None,
) -> Plan:
    """The launch that writes `out`; none of M, N, K and G is 0.

    Args:
        grouping: Which of the four products.
        a: [M, K], or [G, M, K] if masked; `movable` data.
        b: [N, K], or [G, N, K] for groups of rows; `movable` data.
        out: [M, N] or [G, M, N], rows contiguous.
        sms: Multiprocessors to use.
        layout: int32: group of each row, rows per group, or end of each group along K.
        c: What to add, of out's shape and dtype, rows contiguous.
        alignment: Groups begin at multiples of it.
        tile: Instead of the one that `choose` gives.
    """
    rows_of_c = None if c is None else (c.stride(-2), c.stride(0))
    like = _Like(
        grouping, _memory(a.data), _memory(b.data), _memory(out), a.scale.stride(), b.scale.stride(), rows_of_c,
        b.block[0] == 1, out.dtype, alignment, sms, tile,
    )  # fmt: skip
    fixed = _fixed(like)
    box_a, box_b, box_d = fixed.boxes
    maps = (
        TensorMap(a.data.data_ptr(), *box_a),
        TensorMap(b.data.data_ptr(), *box_b),
        TensorMap((out if fixed.variant.tile_store else a.data).data_ptr(), *box_d),
    )
    args = Args(
        a.scale.data_ptr(),
        b.scale.data_ptr(),
        None if layout is None else layout.data_ptr(),
        None if c is None else c.data_ptr(),
        out.data_ptr(),
        *fixed.numbers,
    )
    return Plan(fixed.variant, maps, args, fixed.how)


def movable(x: Tensor) -> Tensor:
    """`x` as the copy engine can address it: a copy unless its last dim is contiguous and all else in 16 bytes."""
    return x if _addressable(_memory(x)) else x.clone(memory_format=torch.contiguous_format)


class _Memory(NamedTuple):
    """Where the elements of a tensor are, up to its address."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    size: int
    """Bytes of an element."""
    aligned: bool
    """The address is a multiple of 16."""


class _Like(NamedTuple):
    """What a plan depends on besides addresses: a model's products are few, and each is planned once."""

    grouping: Grouping
    a: _Memory
    b: _Memory
    out: _Memory
    scale_a: tuple[int, ...]
    scale_b: tuple[int, ...]
    rows_of_c: tuple[int, int] | None
    column_scales: bool
    dtype: torch.dtype
    alignment: int
    sms: int
    tile: Tile | None


_Box = tuple[str, tuple[int, int, int], tuple[int, int], tuple[int, int, int], int]
"""A `TensorMap` without its address."""


@dataclass(frozen=True)
class _Fixed:
    variant: Variant
    boxes: tuple[_Box, _Box, _Box]
    numbers: tuple[int, ...]
    """The fields of `Args` after its pointers."""
    how: Launch


def _memory(x: Tensor) -> _Memory:
    return _Memory(x.shape, x.stride(), x.element_size(), x.data_ptr() % 16 == 0)


@lru_cache(maxsize=4096)
def _fixed(like: _Like) -> _Fixed:
    a, b, out, M, N = like.a, like.b, like.out, like.out.shape[-2], like.out.shape[-1]
    groups = out.shape[0] if len(out.shape) == 3 else b.shape[0] if len(b.shape) == 3 else 1
    tile_store = like.rows_of_c is None and like.dtype == torch.bfloat16 and _addressable(out)
    problem = Problem(
        m=M,
        n=N,
        k=a.shape[-1],
        groups=groups,
        grouping=like.grouping,
        alignment=like.alignment,
        column_scales=like.column_scales,
        tile_store=tile_store,
        out_bytes=out.size,
    )
    tile = like.tile or choose(problem, like.sms)
    rows_a = tile.block_m // (2 if tile.share == Share.A else 1)
    rows_b = tile.block_n // (2 if tile.share == Share.B else 1)
    box_a, box_b = _box(a, "uint8", (BLOCK_K, rows_a), 128), _box(b, "uint8", (BLOCK_K, rows_b), 128)
    box_d = box_a  # not used
    if tile_store:
        columns = next(width for width in (64, 32, 16) if tile.block_n % width == 0)
        box_d = _box(out, "bfloat16", (columns, min(tile.block_m, 64)), columns * 2)
    numbers = (
        *(out.stride[-2], out.stride[0], *(like.rows_of_c or (0, 0))),
        *_scale_strides(like.scale_a),
        *_scale_strides(like.scale_b),
        *(M, N, groups, problem.k, band(tile), like.alignment),
    )
    variant = Variant(tile, like.grouping, like.column_scales, out.size, tile_store, like.rows_of_c is not None)
    how = Launch(grid(problem, tile, like.sms), tile.threads, tile.cluster, tile.shared_bytes)
    return _Fixed(variant, (box_a, box_b, box_d), numbers, how)


@lru_cache(maxsize=4096)
def _addressable(x: _Memory) -> bool:
    outer = [stride * x.size for stride, dim in zip(x.stride[:-1], x.shape[:-1], strict=True) if dim > 1]
    nested = all(stride % inner == 0 for stride, inner in zip(outer, outer[1:], strict=False) if inner)
    whole = all(stride % 16 == 0 and stride > 0 for stride in outer)
    last = x.stride[-1] == 1 or x.shape[-1] == 1
    return x.aligned and last and whole and nested and x.shape[-1] * x.size % 16 == 0


def _box(x: _Memory, element: str, box: tuple[int, int], swizzle: int) -> _Box:
    """Boxes of one matrix of `x` [rows, columns] or [groups, rows, columns]."""
    rows, columns = x.shape[-2:]
    row = x.stride[-2] * x.size if rows > 1 else columns * x.size
    groups = x.shape[0] if len(x.shape) == 3 else 1
    group = x.stride[0] * x.size if groups > 1 else row * rows
    return element, (columns, rows, groups), (row, group), (*box, 1), swizzle


def _scale_strides(stride: tuple[int, ...]) -> tuple[int, int, int]:
    return stride[-2], stride[-1], stride[0] if len(stride) == 3 else 0
