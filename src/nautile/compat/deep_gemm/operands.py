"""Operands as DeepGEMM's callers hand them in: checked, and turned into ours.

A matrix is *K-major* if the dimension that is summed over is contiguous in memory. FP8 operands are pairs (data,
scales). A recipe is (rows of A, rows of B, columns of both) that share a scale.
"""

import torch
from torch import Tensor

from nautile.compat.deep_gemm.errors import need, sm100_only
from nautile.ops.fp8_tensor import Fp8Tensor

Pair = tuple[Tensor, Tensor]
Recipe = tuple[int, int, int]
Granularity = tuple[int, int]

DEFAULT_RECIPE: Recipe = (1, 128, 128)
"""A tile of 1 × 128 activations, a block of 128 × 128 weights (SM90)."""


def transposed(pair: Pair) -> Pair:
    """Data and scales of the transpose, as views."""
    return pair[0].mT, pair[1].mT


def recipes(
    function: str, recipe: Recipe | None, recipe_a: Granularity | None, recipe_b: Granularity | None
) -> tuple[Granularity, Granularity]:
    """Rows and columns that share a scale in A and in B."""
    need((recipe_a is None) == (recipe_b is None), function, "recipe_a and recipe_b are given together or not at all")
    need(recipe is None or recipe_a is None, function, "give recipe, or recipe_a and recipe_b, not both")
    if recipe_a is not None and recipe_b is not None:
        return recipe_a, recipe_b
    rows_a, rows_b, columns = recipe or DEFAULT_RECIPE
    return (rows_a, columns), (rows_b, columns)


def fp8(function: str, name: str, pair: Pair, granularity: Granularity, dims: int) -> Fp8Tensor:
    """The pair as one of our tensors, [.., rows, K].

    Raises:
        DeepGemmError: Type, layout or scales are not those of an SM90 kernel.
        NotOnHopperError: The pair is FP4, or its scales are packed or finer than 128.
    """
    data, scale = pair
    if data.dtype in (torch.int8, torch.uint8):
        sm100_only(function, f"{name} in FP4")
    need(data.dtype == torch.float8_e4m3fn, function, f"{name} must be float8_e4m3fn, got {data.dtype}")
    need(data.dim() == dims, function, f"{name} must have {dims} dimensions, got {list(data.shape)}")
    need(k_major(data), function, f"{name} must be K-major on SM90, got {_layout(data)}")
    if scale.dtype == torch.int32:
        sm100_only(function, f"{name} with packed UE8M0 scales (int32)")
    rows, columns = granularity
    if columns != 128:
        sm100_only(function, f"{name} with a scale per {columns} columns")
    need(scale.dtype == torch.float32, function, f"scales of {name} must be float32, got {scale.dtype}")
    need(rows in (1, 128), function, f"scales of {name} serve 1 or 128 rows, got a recipe of {rows}")
    want = [*data.shape[:-2], -(-data.shape[-2] // rows), -(-data.shape[-1] // columns)]
    need(
        list(scale.shape) == want,
        function,
        f"scales of {name} {list(data.shape)} must be {want}, one for {rows} x {columns}, got {list(scale.shape)}",
    )
    return Fp8Tensor(data, scale, granularity)


def matrix(function: str, name: str, x: Tensor, dims: int, *dtypes: torch.dtype) -> Tensor:
    """`x`, if it has so many dimensions, one of the types, and one of its last two dimensions contiguous."""
    need(x.dtype in dtypes, function, f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}")
    need(x.dim() == dims, function, f"{name} must have {dims} dimensions, got {list(x.shape)}")
    need(k_major(x) or x.stride(-2) == 1, function, f"{name} must be contiguous in a dimension, got {_layout(x)}")
    return x


def result(
    function: str, d: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], c: Tensor | None = None
) -> Tensor:
    """`d`, if it is a row-major result of that shape and one of these types, and `c`, if given, is like it."""
    for name, x in (("d", d), ("c", c)):
        if x is not None:
            need(x.dtype in dtypes, function, f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}")
            need(tuple(x.shape) == shape, function, f"{name} must be {list(shape)}, got {list(x.shape)}")
            need(k_major(x), function, f"{name} must be row-major, got {_layout(x)}")
    need(
        c is None or c.dtype == d.dtype,
        function,
        f"c must be {d.dtype} as d is, got {c.dtype if c is not None else ''}",
    )
    return d


def k_major(x: Tensor) -> bool:
    """Whether the last dimension is contiguous, or too short to tell."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def _layout(x: Tensor) -> str:
    return f"shape {list(x.shape)} with strides {list(x.stride())}"
