"""How dense decoding over paged latents is handed to mla_decode.cu: a pure function of shapes, strides and addresses.

B requests, S queries, H heads, X = 576 dimensions of a latent, V = 512 of its value, N pages of P places, R splits.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nautile.core.cuda_driver import Launch, TensorMap
from nautile.ops.split_kv import TILE, Splits

SOURCE = Path(__file__).with_name("mla_decode.cu")
HEADERS = (SOURCE.with_name("mla_work.cuh"), SOURCE.with_name("ptx.cuh"))
KERNEL, MERGE = "mla_decode", "mla_merge"
LATENT, VALUE = 576, 512
TILE_BYTES = TILE * LATENT * 2
SHARED_BYTES = 3 * TILE_BYTES + 6 * 8 + 3 * TILE * 4
"""Queries, two tiles of latents; barriers; three numbers per row."""
MERGE_ROWS = 8
LOG2_E = 1.4426950408889634


class Args(ctypes.Structure):
    """``struct Args`` of mla_work.cuh."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("block_table", "lengths", "splits", "ends", "out", "lse", "part", "part_lse")
        ),
        *((name, ctypes.c_int) for name in ("queries", "heads", "page", "table_row", "row_tiles", "causal")),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True)
class Plan:
    """Two launches, complete: the splits, then the merging of those that belong together."""

    maps: tuple[TensorMap, TensorMap]
    """For the first; the second takes `args` only."""
    args: Args
    how: Launch
    how_to_merge: Launch


def why_unfit(q_BSHX: Tensor, cache_NPGX: Tensor, v_dim: int) -> str | None:
    """Why the kernel cannot serve these sizes; None if it can."""
    (X, dtype), (_, P, G, _) = (q_BSHX.shape[3], q_BSHX.dtype), cache_NPGX.shape
    if (X, v_dim, G) != (LATENT, VALUE, 1):
        return f"is made for latents of {LATENT} with values of {VALUE} and one latent head, not {X}, {v_dim}, {G}"
    if dtype != torch.bfloat16:
        return f"is made for bfloat16, not {dtype}"
    if P % TILE or any(stride % 8 for stride in cache_NPGX.stride()[:2]) or cache_NPGX.data_ptr() % 16:
        return f"wants pages of a multiple of {TILE} places that begin at multiples of 16 bytes"
    return None


def plan(
    q_BSHX: Tensor,
    cache_NPGX: Tensor,
    block_table_BW: Tensor,
    lengths_B: Tensor,
    splits: Splits,
    scale: float,
    causal: bool,
    o_BSHV: Tensor,
    lse_BHS: Tensor,
    part_RSHV: Tensor,
    part_RSH: Tensor,
) -> Plan:
    """The launches that fill o and lse. Parts are room for the results of splits: float32 [R, S, H, V] and [R, S, H].

    All but the cache and the block table are contiguous, the latter within its rows; sizes are not `why_unfit`.
    """
    (B, S, H, X), (N, P, _, _) = q_BSHX.shape, cache_NPGX.shape
    rows = S * H
    map_q = TensorMap(q_BSHX.data_ptr(), "bfloat16", (X, rows, B), (X * 2, rows * X * 2), (64, TILE, 1), 128)
    place, page = cache_NPGX.stride(1) * 2, cache_NPGX.stride(0) * 2
    map_cache = TensorMap(cache_NPGX.data_ptr(), "bfloat16", (X, P, N), (place, page), (64, TILE, 1), 128)
    row_tiles = -(-rows // TILE)
    pointers = (block_table_BW, lengths_B, splits.table_R3, splits.ends_B, o_BSHV, lse_BHS, part_RSHV, part_RSH)
    args = Args(
        *(x.data_ptr() for x in pointers), S, H, P, block_table_BW.stride(0), row_tiles, int(causal), scale * LOG2_E
    )
    how = Launch(row_tiles * splits.table_R3.shape[0], 384, 1, SHARED_BYTES)
    return Plan((map_q, map_cache), args, how, Launch(B * -(-rows // MERGE_ROWS), MERGE_ROWS * 32, 1, 0))
