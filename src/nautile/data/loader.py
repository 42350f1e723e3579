"""Batches from token shards: the same ones for a seed, whatever stopped in between and on however many ranks.

The stream is cut into windows of `window` tokens that overlap by one, so that every token but the first is a target
exactly once per epoch. Legend: B rows, W tokens of a window, S = W - 1 inputs of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nautile.core.errors import UserError
from nautile.data.shards import TokenShards


@dataclass(frozen=True)
class Batch:
    """Rows for one step: inputs are ``tokens_BW[:, :-1]``, targets ``tokens_BW[:, 1:]``."""

    tokens_BW: Tensor
    """int64 [B, W]."""
    cu_seqlens: Tensor
    """int64 [pieces + 1]: where rows and documents begin in the flattened [B·S] inputs, then B·S."""


class Loader:
    """Endless shuffled batches; each epoch visits every window once, in an order drawn from (seed, epoch).

    The position is a count of samples over all ranks. A step takes the next ``world_size · batch_size`` samples and
    rank r the r-th `batch_size` of them, so a run may go on with more or fewer ranks where it stopped.
    The order of an epoch takes 8 bytes of memory per window.

    Args:
        shards: The training split.
        batch_size: Rows B per rank.
        window: Tokens W of a row: the sequence length and one more.
        seed: Chooses the order.
        rank: Which of the ranks this is.
        world_size: How many ranks read together.

    Raises:
        UserError: the split does not fill one batch.
    """

    def __init__(
        self, shards: TokenShards, batch_size: int, window: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.shards, self.batch_size, self.window, self.seed = shards, batch_size, window, seed
        self.rank, self.world_size = rank, world_size
        self.num_windows = count_windows(shards, window)
        _check_one_batch(shards, batch_size * world_size, window)
        self._samples = 0
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))

    def next_batch(self) -> Batch:
        """The next rows of this rank."""
        first = self._samples + self.rank * self.batch_size
        starts = [self._window_of(sample) * (self.window - 1) for sample in range(first, first + self.batch_size)]
        self._samples += self.batch_size * self.world_size
        return read_rows(self.shards, starts, self.window)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    @property
    def epochs(self) -> float:
        """How often the corpus has been read so far."""
        return self._samples / self.num_windows

    def state(self) -> dict[str, int]:
        """Position, with what it depends on."""
        return {"samples": self._samples, "seed": self.seed, "window": self.window, "tokens": self.shards.num_tokens}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a `state`, of a loader of any number of ranks and any batch size.

        Raises:
            UserError: the state belongs to another order: another seed, window or corpus.
        """
        for key, now in self.state().items():
            if key != "samples" and state[key] != now:
                raise UserError(
                    f"cannot resume the data: {key} was {state[key]} and is {now}",
                    "the position counts samples of one order, which depends on it",
                    f"set it back to {state[key]}, or start a new run",
                )
        self._samples = state["samples"]

    def _window_of(self, sample: int) -> int:
        epoch, position = divmod(sample, self.num_windows)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_windows))
        return int(self._order[1][position])


def sequential_windows(
    shards: TokenShards, window: int, limit: int | None = None, batch_size: int = 8
) -> Iterator[Batch]:
    """Batches of the split from its beginning, for validation: every token is a target at most once.

    Args:
        shards: The validation split.
        window: Tokens W of a row.
        limit: Most windows to give; None for all. A rest shorter than a window is left out.
        batch_size: Rows per batch; the last batch may have fewer.

    Raises:
        UserError: the split does not fill one window.
    """
    _check_one_batch(shards, 1, window)
    windows = count_windows(shards, window)
    starts = [index * (window - 1) for index in range(windows if limit is None else min(limit, windows))]
    return (read_rows(shards, starts[at : at + batch_size], window) for at in range(0, len(starts), batch_size))


def count_windows(shards: TokenShards, window: int) -> int:
    """Windows of `window` tokens, overlapping by one, that fit into the split."""
    return max(shards.num_tokens - 1, 0) // (window - 1)


def read_rows(shards: TokenShards, starts: list[int], window: int) -> Batch:
    """The windows that begin at `starts`, as one batch."""
    S = window - 1
    tokens_BW = np.stack([shards.window(start, window) for start in starts])
    pieces = [np.union1d(shards.starts_within(start, S), [0]) + row * S for row, start in enumerate(starts)]
    cu_seqlens = np.concatenate([*pieces, [len(starts) * S]])
    return Batch(torch.from_numpy(tokens_BW), torch.from_numpy(cu_seqlens))


def _check_one_batch(shards: TokenShards, rows: int, window: int) -> None:
    needed = rows * (window - 1) + 1
    if shards.num_tokens >= needed:
        return
    batch = f"1 row of {window} needs" if rows == 1 else f"{rows} rows of {window} need"
    raise UserError(
        f"{shards.folder} holds {shards.num_tokens} tokens, but {batch} {needed}",
        "the corpus is smaller than one batch",
        "give more text (data.paths, data.max-megabytes), or lower the batch size or the sequence length",
    )
