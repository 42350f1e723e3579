"""How one FP8 product is handed to fp8_gemm.cu: its tile, its arguments, and the boxes that the copy engine moves.

Pure functions of shapes, strides and addresses; nothing here needs a GPU. M, N, K, G as in `ops/fp8_products.py`.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nautile.core.cuda_driver import Launch, TensorMap
from nautile.ops.fp8_tensor import Fp8Tensor
from nautile.ops.hopper.tiles import Grouping, Problem, Share, Tile, band, choose, grid

SOURCE = Path(__file__).with_name("fp8_gemm.cu")
HEADERS = (Path(__file__).with_name("ptx.cuh"),)
KERNEL = "fp8_gemm"
BLOCK_K = 128


class Args(ctypes.Structure):
    """``struct Args`` of fp8_gemm.cu."""

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
    groups = out.shape[0] if out.dim() == 3 else b.shape[0] if b.data.dim() == 3 else 1
    tile_store = c is None and out.dtype == torch.bfloat16 and _addressable(out)
    problem = Problem(
        m=out.shape[-2],
        n=out.shape[-1],
        k=a.shape[-1],
        groups=groups,
        grouping=grouping,
        alignment=alignment,
        column_scales=b.block[0] == 1,
        tile_store=tile_store,
        out_bytes=out.element_size(),
    )
    tile = tile or choose(problem, sms)
    variant = Variant(tile, grouping, problem.column_scales, problem.out_bytes, tile_store, c is not None)
    rows_a = tile.block_m // (2 if tile.share == Share.A else 1)
    rows_b = tile.block_n // (2 if tile.share == Share.B else 1)
    map_a = _map(a.data, "uint8", (BLOCK_K, rows_a), 128)
    map_b = _map(b.data, "uint8", (BLOCK_K, rows_b), 128)
    map_d = map_a
    if tile_store:
        columns = next(width for width in (64, 32, 16) if tile.block_n % width == 0)
        map_d = _map(out, "bfloat16", (columns, min(tile.block_m, 64)), columns * 2)
    args = Args(
        a.scale.data_ptr(),
        b.scale.data_ptr(),
        None if layout is None else layout.data_ptr(),
        None if c is None else c.data_ptr(),
        out.data_ptr(),
        out.stride(-2),
        out.stride(0),
        0 if c is None else c.stride(-2),
        0 if c is None else c.stride(0),
        *_scale_strides(a.scale),
        *_scale_strides(b.scale),
        problem.m,
        problem.n,
        groups,
        problem.k,
        band(tile),
        alignment,
    )
    how = Launch(grid(problem, tile, sms), tile.threads, tile.cluster, tile.shared_bytes)
    return Plan(variant, (map_a, map_b, map_d), args, how)


def movable(x: Tensor) -> Tensor:
    """`x` as the copy engine can address it: a copy unless its last dim is contiguous and all else in 16 bytes."""
    return x if _addressable(x) else x.contiguous()


def _addressable(x: Tensor) -> bool:
    size = x.element_size()
    outer = [stride * size for stride, dim in zip(x.stride()[:-1], x.shape[:-1], strict=True) if dim > 1]
    nested = all(stride % inner == 0 for stride, inner in zip(outer, outer[1:], strict=False) if inner)
    whole = all(stride % 16 == 0 and stride > 0 for stride in outer)
    last = x.stride(-1) == 1 or x.shape[-1] == 1
    return last and whole and nested and x.data_ptr() % 16 == 0 and x.shape[-1] * size % 16 == 0


def _map(x: Tensor, element: str, box: tuple[int, int], swizzle: int) -> TensorMap:
    """Boxes of one matrix of `x` [rows, columns] or [groups, rows, columns]."""
    size, (rows, columns) = x.element_size(), x.shape[-2:]
    row = x.stride(-2) * size if rows > 1 else columns * size
    groups = x.shape[0] if x.dim() == 3 else 1
    group = x.stride(0) * size if groups > 1 else row * rows
    return TensorMap(x.data_ptr(), element, (columns, rows, groups), (row, group), (*box, 1), swizzle)


def _scale_strides(scale: Tensor) -> tuple[int, int, int]:
    return scale.stride(-2), scale.stride(-1), scale.stride(0) if scale.dim() == 3 else 0
