from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nautile.data.shards import ShardWriter, TokenShards


@pytest.fixture
def write_shards(tmp_path_factory) -> Callable[..., TokenShards]:
    """Write documents of token ids as a split; id t stands for t % 4 bytes."""

    def write(documents: list[list[int]], vocab_size: int = 1000, shard_tokens: int = 7) -> TokenShards:
        folder: Path = tmp_path_factory.mktemp("shards")
        writer = ShardWriter(folder, np.arange(vocab_size) % 4, shard_tokens)
        for index, tokens in enumerate(documents):
            writer.add(f"document {index}", tokens)
        writer.close()
        return TokenShards(folder)

    return write


@pytest.fixture
def write_stream(write_shards) -> Callable[[int], TokenShards]:
    """A split of `tokens` tokens whose ids are their positions, in documents of five."""

    def write(tokens: int) -> TokenShards:
        documents = [list(range(start, min(start + 5, tokens))) for start in range(0, tokens, 5)]
        return write_shards(documents, vocab_size=100_000)

    return write
