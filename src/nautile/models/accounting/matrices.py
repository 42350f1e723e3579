"""The weights of one layer, as matrices and vectors.

Letters: D hidden, H heads.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from nautile.models.accounting.shape import GroupedAttention, LatentAttention, Shape

FP8_BLOCK = 128
"""Side of the weight blocks that share one scale in a published FP8 checkpoint (V3 paper §3.3)."""


@dataclass(frozen=True)
class Matrix:
    """The weight [rows, columns] of a linear map, `copies` times."""

    rows: int
    columns: int
    copies: int = 1
    fp8: bool = True
    """Published V3 checkpoints store it in FP8 with block scales."""

    @property
    def numel(self) -> int:
        """Numbers in all copies."""
        return self.rows * self.columns * self.copies

    @property
    def scales(self) -> int:
        """Block scales of all copies; a partial block has one, too."""
        return ceil(self.rows / FP8_BLOCK) * ceil(self.columns / FP8_BLOCK) * self.copies if self.fp8 else 0


def attention_matrices(shape: Shape) -> list[Matrix]:
    """The projections of one attention layer."""
    D, H, attention = shape.hidden, shape.heads, shape.attention
    if isinstance(attention, GroupedAttention):
        queries, keys = H * attention.head_dim, attention.kv_heads * attention.head_dim
        return [Matrix(queries, D), Matrix(keys, D), Matrix(keys, D), Matrix(D, queries)]
    queries = H * (attention.nope + attention.rope)
    rank = attention.q_lora_rank
    query = [Matrix(queries, D)] if rank is None else [Matrix(rank, D), Matrix(queries, rank)]
    latent = [
        Matrix(attention.kv_lora_rank + attention.rope, D),
        Matrix(H * (attention.nope + attention.value), attention.kv_lora_rank),
    ]
    return [*query, *latent, Matrix(D, H * attention.value), *_indexer_matrices(shape)]


def _indexer_matrices(shape: Shape) -> list[Matrix]:
    indexer = shape.indexer
    if indexer is None or not isinstance(shape.attention, LatentAttention):
        return []
    query_input = shape.attention.q_lora_rank or shape.hidden
    return [
        Matrix(indexer.heads * indexer.head_dim, query_input),
        Matrix(indexer.head_dim, shape.hidden),
        Matrix(indexer.heads, shape.hidden, fp8=False),
    ]


def swiglu_matrices(hidden: int, width: int, copies: int = 1) -> list[Matrix]:
    """Gate, up and down projection of a SwiGLU."""
    return [Matrix(width, hidden, copies), Matrix(width, hidden, copies), Matrix(hidden, width, copies)]


def attention_vectors(shape: Shape) -> int:
    """Biases and latent norms of one attention layer."""
    attention = shape.attention
    if isinstance(attention, GroupedAttention):
        qkv = (shape.heads + 2 * attention.kv_heads) * attention.head_dim
        return qkv * attention.qkv_bias + shape.hidden * attention.output_bias
    index_norm = 2 * attention.indexer.head_dim if attention.indexer else 0  # a LayerNorm: weight and bias
    return attention.kv_lora_rank + (attention.q_lora_rank or 0) + index_norm


def numel(matrices: Iterable[Matrix]) -> int:
    """Numbers in all of them."""
    return sum(matrix.numel for matrix in matrices)
