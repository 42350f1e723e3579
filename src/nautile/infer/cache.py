"""The cache of past tokens during generation: what each attention layer declared, for a batch of sequences.

B sequences, S new tokens each, T cached positions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nautile.core.context import CacheSpec

SMALLEST = 64
"""Positions allocated at first."""


class KVCache:
    """One buffer [B, capacity, ...] per layer and entry, where the row index is the absolute position.

    Implements `nautile.core.context.CacheView`. `reserve` makes room before a forward; buffers grow by doubling, so a
    sequence of T tokens copies less than 2·T rows in all. Rows are zero until written: whoever masks them multiplies
    them by an exact 0, and 0·0 is not NaN as 0·(uninitialised) can be. What the entries mean is the layer's business:
    MLA declares a latent and a rotated key, grouped-query attention keys and values, the sparse indexer its keys.

    Args:
        specs: What each layer stores per token, from the model's `cache_specs()`. None may declare `state`: memory of
            one size per sequence is not kept here.
        batch: Sequences B.
        dtype: Type of the entries: that of the activations.
        device: Where the buffers live.
    """

    def __init__(
        self, specs: Sequence[CacheSpec], batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        stateful = [name for spec in specs for name in spec.state]
        assert not stateful, f"this cache holds rows per token, not the per-sequence state {stateful}"
        self.capacity = 0
        self.visible = 0
        self.layers: list[dict[str, Tensor]] = [
            {name: torch.zeros(batch, 0, *shape, dtype=dtype, device=device) for name, shape in spec.paged.items()}
            for spec in specs
        ]

    def reserve(self, length: int) -> None:
        """Make room for positions 0..length−1 and show that many to attention from now on."""
        self.visible = length
        if length <= self.capacity:
            return
        self.capacity = max(length, 2 * self.capacity, SMALLEST)
        for layer in self.layers:
            for name, rows_BT in layer.items():
                grown_BT = rows_BT.new_zeros(rows_BT.shape[0], self.capacity, *rows_BT.shape[2:])
                grown_BT[:, : rows_BT.shape[1]] = rows_BT
                layer[name] = grown_BT

    def update(self, layer: int, positions_BS: Tensor, **entries: Tensor) -> dict[str, Tensor]:
        """Write each entry [B, S, ...] at its positions; return the rows reserved so far, name → [B, T, ...]."""
        return write_rows(self.layers[layer], self.visible, positions_BS, entries)

    def row(self, index: int) -> "CacheRow":
        """The cache of one sequence, for its prefill."""
        return CacheRow(self, index)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all sequences but these, in this order: finished ones cost nothing any more."""
        for layer in self.layers:
            for name, rows_BT in layer.items():
                layer[name] = rows_BT[list(rows)]


class CacheRow:
    """One sequence of a `KVCache` as a cache of batch size 1."""

    def __init__(self, cache: KVCache, index: int) -> None:
        self.cache, self.index = cache, index

    def reserve(self, length: int) -> None:
        """As `KVCache.reserve`."""
        self.cache.reserve(length)

    def update(self, layer: int, positions_BS: Tensor, **entries: Tensor) -> dict[str, Tensor]:
        """As `KVCache.update`, with B = 1."""
        mine = slice(self.index, self.index + 1)
        rows = {name: rows_BT[mine] for name, rows_BT in self.cache.layers[layer].items()}
        return write_rows(rows, self.cache.visible, positions_BS, entries)


def write_rows(
    buffers: Mapping[str, Tensor], visible: int, positions_BS: Tensor, entries: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Write entries [B, S, ...] into buffers [B, capacity, ...] in place; return the first `visible` rows of each."""
    rows_B1 = torch.arange(positions_BS.shape[0], device=positions_BS.device)[:, None]
    for name, entry_BS in entries.items():
        buffers[name][rows_B1, positions_BS] = entry_BS.to(buffers[name].dtype)
    return {name: buffer_BT[:, :visible] for name, buffer_BT in buffers.items()}
