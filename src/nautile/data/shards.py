"""One split of a prepared corpus on disk: token files to be memory-mapped, and an index.

FOLDER/
    index.json              counts, dtype, and the token files in order
    tokens-00000.bin ...    little-endian unsigned integers, 2 bytes each where the vocabulary allows
    document_starts.npy     int64 [documents]: position of each document's first token
    byte_lengths.npy        int64 [vocabulary]: UTF-8 bytes of each token, 0 for special tokens
    names.json              names of the documents, in order
"""

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from nautile.core.errors import NautileError, UserError

INDEX = "index.json"


class TokenShards:
    """The packed tokens of a split: every document with its beginning and end token, one after the other.

    Args:
        folder: A split's folder, as `ShardWriter` leaves it.

    Raises:
        UserError: the folder holds no tokens.
        NautileError: a token file is missing or has another length than the index says.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise UserError(
                f"{folder} holds no prepared tokens",
                f"there is no {INDEX} in it",
                "prepare a corpus: nautile data prepare",
            )
        index = json.loads((self.folder / INDEX).read_text("utf-8"))
        self.num_tokens: int = index["tokens"]
        """Tokens of the split, special ones included."""
        self.num_bytes: int = index["bytes"]
        """UTF-8 bytes of the text that the tokens encode."""
        self.document_starts: NDArray[np.int64] = np.load(self.folder / "document_starts.npy", mmap_mode="r")
        """int64 [documents]: position of each document's first token."""
        self.byte_lengths: NDArray[np.int64] = np.load(self.folder / "byte_lengths.npy")
        """int64 [vocabulary]: UTF-8 bytes that each token stands for."""
        lengths = [shard["tokens"] for shard in index["shards"]]
        self._ends = np.array(list(accumulate(lengths)), dtype=np.int64)
        self._files = [
            _map(self.folder / shard["file"], np.dtype(index["dtype"]), shard["tokens"]) for shard in index["shards"]
        ]

    def window(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens [start, start + length) as int64, wherever the files are divided.

        Raises:
            IndexError: the window reaches outside the split.
        """
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"window [{start}, {start + length}) outside the {self.num_tokens} tokens")
        tokens = np.empty(length, dtype=np.int64)
        done = 0
        while done < length:
            shard = int(np.searchsorted(self._ends, start + done, side="right"))
            offset = start + done - (self._ends[shard] - len(self._files[shard]))
            piece = self._files[shard][offset : offset + length - done]
            tokens[done : done + len(piece)] = piece
            done += len(piece)
        return tokens

    def starts_within(self, start: int, length: int) -> NDArray[np.int64]:
        """Positions, relative to `start`, of the documents that begin in [start, start + length)."""
        low, high = np.searchsorted(self.document_starts, [start, start + length])
        return self.document_starts[low:high] - start

    def count_bytes(self, tokens: NDArray[np.int64]) -> int:
        """UTF-8 bytes that `tokens` stand for: what a loss over exactly these targets is divided by."""
        return int(self.byte_lengths[tokens].sum())

    def names(self) -> list[str]:
        """Names of the documents, in order."""
        return json.loads((self.folder / "names.json").read_text("utf-8"))

    def document(self, index: int) -> NDArray[np.int64]:
        """Tokens of one document, with its beginning and end token."""
        start = int(self.document_starts[index])
        following = index + 1
        end = int(self.document_starts[following]) if following < len(self.document_starts) else self.num_tokens
        return self.window(start, end - start)


class ShardWriter:
    """Writes a split; `close` completes the folder, which a `TokenShards` then reads.

    Args:
        folder: Empty folder to fill.
        byte_lengths: int64 [vocabulary]: UTF-8 bytes of each token.
        shard_tokens: Tokens of one file.
    """

    def __init__(self, folder: Path, byte_lengths: NDArray[np.int64], shard_tokens: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._byte_lengths, self._shard_tokens = folder, byte_lengths, shard_tokens
        self._dtype = np.dtype("<u2" if len(byte_lengths) <= 1 << 16 else "<u4")
        self._shards: list[dict[str, str | int]] = []
        self._file: BinaryIO | None = None
        self._room = 0
        self._starts: list[int] = []
        self._names: list[str] = []
        self.num_tokens = 0
        """Tokens written so far."""
        self.num_bytes = 0
        """Bytes of text that they encode."""

    def add(self, name: str, tokens: Sequence[int]) -> None:
        """Append one document's tokens; files are filled to the brim, so a document may reach into the next one."""
        self._names.append(name)
        self._starts.append(self.num_tokens)
        ids = np.asarray(tokens, dtype=np.int64)
        self.num_tokens += len(ids)
        self.num_bytes += int(self._byte_lengths[ids].sum())
        packed = ids.astype(self._dtype)
        while len(packed):
            file = self._file if self._file is not None and self._room else self._next_file()
            piece, packed = packed[: self._room], packed[self._room :]
            file.write(piece.tobytes())
            self._room -= len(piece)
            self._shards[-1]["tokens"] = self._shard_tokens - self._room

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._starts)

    def close(self) -> None:
        """Write the index. Without it the folder is not a split."""
        if self._file is not None:
            self._file.close()
        np.save(self._folder / "document_starts.npy", np.array(self._starts, dtype=np.int64))
        np.save(self._folder / "byte_lengths.npy", self._byte_lengths)
        _write_json(self._folder / "names.json", self._names)
        index = {
            "dtype": self._dtype.str,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "documents": len(self._starts),
            "shards": self._shards,
        }
        _write_json(self._folder / INDEX, index)

    def _next_file(self) -> BinaryIO:
        if self._file is not None:
            self._file.close()
        name = f"tokens-{len(self._shards):05}.bin"
        self._shards.append({"file": name, "tokens": 0})
        self._room = self._shard_tokens
        self._file = (self._folder / name).open("wb")
        return self._file


def _map(file: Path, dtype: np.dtype, tokens: int) -> np.memmap:
    size = file.stat().st_size if file.is_file() else 0
    if size != tokens * dtype.itemsize:
        raise NautileError(
            f"{file} has {size} bytes instead of {tokens * dtype.itemsize}",
            "the prepared corpus was changed or damaged after it was written",
            f"remove {file.parent.parent} and run the same command again; it is then prepared anew",
        )
    return np.memmap(file, dtype=dtype, mode="r")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
