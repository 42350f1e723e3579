"""What travels with a forward pass beside the hidden states.

Layers receive everything that is not a weight or an activation through one `ForwardContext`: there are no globals and
no module state that a forward changes.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

IndexStage = Literal["dense", "warmup", "sparse"]
"""What attention behind an indexer does while it is trained (DeepSeek-V3.2-Exp §2.1.1).

dense: everything is read, the indexer rests. warmup: everything is read, and the indexer learns how. sparse: what the
indexer selects is read, and it learns how that is read.
"""


@dataclass(frozen=True)
class CacheSpec:
    """What one attention layer stores for every past token.

    The engine allocates from specs and never assumes keys and values.
    """

    paged: dict[str, tuple[int, ...]]
    """Entry name → trailing shape of one token's entry, e.g. ``{"c_kv": (512,), "k_rope": (64,)}``."""
    state: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Entry name → shape of a fixed-size state per sequence (none in MLA)."""


class CacheView(Protocol):
    """The rows of a cache that the current batch may read and write. Row index = absolute position."""

    def update(self, layer: int, positions_BS: Tensor, **entries: Tensor) -> dict[str, Tensor]:
        """Write each entry [B, S, ...] at its positions; return all rows so far, name → [B, T, ...].

        T covers every position written in any row of the batch; the caller masks rows past a query's own position.
        """
        ...


@dataclass(frozen=True)
class ForwardContext:
    """Token ids, positions, document boundaries and cache of one forward pass.

    B sequences, S new tokens each, T cached tokens.
    """

    tokens_BS: Tensor
    """int64 [B, S]: ids of the new tokens."""
    positions_BS: Tensor
    """int64 [B, S]: absolute position of each new token in its sequence, from 0."""
    cu_seqlens: Tensor | None = None
    """int64 [documents + 1]: starts of the packed documents in the flattened [B·S] batch, then B·S.

    When given, attention never crosses a document start. None: rows are plain causal sequences, as V3 trains
    (V3 paper §4.1 packs documents without cross-sample masking).
    """
    cache: CacheView | None = None
    """Past tokens; None in training."""
    from_start: bool = False
    """With a cache: every row starts at position 0, so attention needs no past rows (the prefill of a prompt)."""
    index_stage: IndexStage | None = None
    """Without a cache: the stage of an indexer's training. None: what it selects is read, and nothing is learned."""

    @classmethod
    def for_tokens(
        cls, tokens_BS: Tensor, cu_seqlens: Tensor | None = None, index_stage: IndexStage | None = None
    ) -> "ForwardContext":
        """Context of whole sequences that start at position 0, without a cache."""
        B, S = tokens_BS.shape
        positions_BS = torch.arange(S, device=tokens_BS.device).expand(B, S)
        return cls(tokens_BS, positions_BS, cu_seqlens, index_stage=index_stage)

    def document_ids_BS(self) -> Tensor | None:
        """int64 [B, S], equal for tokens of one document; None when attention may cross documents."""
        if self.cu_seqlens is None:
            return None
        flat = torch.arange(self.tokens_BS.numel(), device=self.tokens_BS.device)
        return torch.bucketize(flat, self.cu_seqlens, right=True).view_as(self.tokens_BS)
