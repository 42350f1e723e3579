"""How decoding over caches of very different lengths is shared out among a GPU's processors: FlashMLA's schedule.

Rows are counted in blocks of 64. A request costs its blocks and a fixed overhead; `parts` equal workers take requests
in order, the last one of each worker cut where its share ends. A piece of a request is a *split*; splits of one request
are merged by their log-sum-exps. Everything here is a function of whole numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

BLOCK = 64
"""Rows of a block."""
OVERHEAD = 5
"""What beginning a request costs, in blocks."""
TILE = 64
"""Rows of queries (a query's heads, those of several queries) that share one reading of the cache."""


@dataclass(frozen=True)
class Part:
    """What one worker does: FlashMLA's record of 8 int32, the last of which is padding."""

    first_request: int
    last_request: int
    """Inclusive."""
    first_block: int
    """Of `first_request`."""
    end_block: int
    """Of `last_request`, exclusive."""
    first_split: int
    """Number, within its request, of the split that it begins with."""
    first_is_split: bool
    """Whether others share `first_request`."""
    last_is_split: bool

    def record(self) -> list[int]:
        """As FlashMLA stores it."""
        return [
            self.first_request, self.last_request, self.first_block, self.end_block, self.first_split,
            int(self.first_is_split), int(self.last_is_split), 0,
        ]  # fmt: skip


@dataclass(frozen=True)
class Splits:
    """The same work as a list of splits, on the device that does it. R = B + parts, which is never too few."""

    table_R3: Tensor
    """int32 (request, first block, end block) in order; (−1, 0, 0) after the last."""
    ends_B: Tensor
    """int32 [B + 1]: splits of request b are rows ends[b] … ends[b + 1] − 1, at least one."""


def dense_parts(processors: int, queries: int, heads: int, latent_heads: int = 1) -> int:
    """Workers for dense decoding: one per processor, of which every latent head and tile of queries needs its own."""
    return max(1, processors // latent_heads // -(-queries * heads // latent_heads // TILE))


def sparse_parts(processors: int, queries: int, heads: int) -> int:
    """Workers for sparse decoding, where every query has rows of its own."""
    return max(1, processors // queries // -(-heads // TILE))


def sparse_length(chosen: int, extra: int = 0, block: int = BLOCK) -> int:
    """Rows of a query of sparse decoding: the second cache's begin with a new block."""
    return -(-max(1, chosen) // block) * block + extra if extra else max(1, chosen)


def split_requests(
    lengths: Sequence[int], parts: int, block: int = BLOCK, overhead: int = OVERHEAD
) -> tuple[list[Part], list[int]]:
    """The work of each of `parts` workers, and where each request's splits begin in the list of all splits.

    No worker has more than ``⌈Σ (blocks + overhead) / parts⌉ + overhead`` to do. Empty requests are one block long.

    Returns:
        `parts` records, those of idle workers beginning at request B; B + 1 sums of splits.

    Raises:
        ValueError: There is no request, or no worker.
    """
    if not lengths or parts < 1:
        raise ValueError(f"split_requests: needs requests and workers, got {len(lengths)} and {parts}")
    blocks = [max(1, -(-length // block)) for length in lengths]
    share = -(-sum(n + overhead for n in blocks) // parts) + overhead
    request = at = split = 0
    done, ends = [], [0]
    for _ in range(parts):
        first, first_block, first_split, left = request, at, split, share
        while request < len(blocks) and left >= blocks[request] - at + overhead:
            left -= blocks[request] - at + overhead
            ends.append(ends[-1] + split + 1)
            request, at, split = request + 1, 0, 0
        if request < len(blocks) and left > overhead:
            at, split = at + left - overhead, split + 1
        last = request if at else request - 1
        end_block = at if at else -(-lengths[last] // block)
        last_is_split = end_block != -(-lengths[last] // block)
        first_is_split = first_block != 0 or (first == last and last_is_split)
        last_is_split |= first == last and first_is_split
        done.append(Part(first, last, first_block, end_block, first_split, first_is_split, last_is_split))
    return done, ends


def list_splits(
    lengths: Sequence[int], parts: int, block: int = BLOCK, overhead: int = OVERHEAD
) -> tuple[list[tuple[int, int, int]], list[int]]:
    """The same splits one by one: (request, first block, end block), and B + 1 sums of splits."""
    work, ends = split_requests(lengths, parts, block, overhead)
    splits = []
    for part in work:
        for request in range(part.first_request, part.last_request + 1):
            first = part.first_block if request == part.first_request else 0
            end = part.end_block if request == part.last_request else -(-lengths[request] // block)
            splits.append((request, first, end))
    return splits, ends
