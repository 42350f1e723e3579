"""From raw text to token shards, once: the result is kept under a name made from everything it depends on.

Three readings of the source, none of which holds the corpus in memory: survey, tokenizer, tokens. The folder appears
whole or not at all, so a process killed on the way leaves nothing that looks finished.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from nautile.core.config import to_mapping
from nautile.core.errors import UserError
from nautile.core.log import log, progress, warn
from nautile.core.nearest import suggestion
from nautile.core.run_folder import atomic_folder
from nautile.data.config import DataConfig
from nautile.data.corpus import Corpus, Entry, open_source
from nautile.data.shards import ShardWriter, TokenShards
from nautile.data.sources.document import Source
from nautile.text import fim
from nautile.text.config import TokenizerConfig
from nautile.text.pretokenize import RULES
from nautile.text.spans import spans
from nautile.text.tokenizer import Tokenizer, train_tokenizer

FORMAT = 1
"""Raise it when the same text would be prepared differently: older folders are then not reused."""

_REPORT = "report.json"
_CHUNK_BYTES = 2_000_000  # text tokenised at a time; the tokenizer's own records take some 30 times its size


@dataclass(frozen=True)
class PreparedData:
    """A prepared corpus: its tokenizer, its two splits and the record of how they came about."""

    folder: Path
    """Where it lies: tokenizer/, train/, validation/ and report.json."""
    tokenizer: Tokenizer
    """What turned the text into tokens."""
    train: TokenShards
    """Documents in the order of the source, a share of them rearranged for fill-in-the-middle."""
    validation: TokenShards
    """Held-out documents, never rearranged, in the order of their hashes, so that any first part is a fair sample."""
    report: dict[str, Any]
    """Documents, bytes and tokens of both splits, what was left out, seconds, and whether this was `reused`."""

    @classmethod
    def open(cls, folder: Path | str, reused: bool = True) -> "PreparedData":
        """Read what `prepare` left in `folder`.

        Raises:
            UserError: there is nothing of the kind.
            NautileError: it is damaged.
        """
        folder = Path(folder)
        if not (folder / _REPORT).is_file():
            beside = [str(report.parent) for report in folder.parent.glob(f"*/{_REPORT}")]
            cure = suggestion(str(folder), beside, "prepared corpora beside it") if beside else "nautile data prepare"
            raise UserError(f"{folder} holds no prepared corpus", f"there is no {_REPORT} in it", cure)
        train, validation = TokenShards(folder / "train"), TokenShards(folder / "validation")
        report = json.loads((folder / _REPORT).read_text("utf-8"))
        return cls(folder, Tokenizer.load(folder / "tokenizer"), train, validation, {**report, "reused": reused})

    @property
    def fingerprint(self) -> str:
        """Name of everything that this was made from; equal fingerprints are equal tokens."""
        return self.report["fingerprint"]

    def read_validation_texts(self, n: int) -> list[tuple[str, str]]:
        """(name, text) of the first `n` held-out documents."""
        return read_documents(self.validation, self.tokenizer, n)


def prepare(data: DataConfig, tokenizer: TokenizerConfig) -> PreparedData:
    """Prepare the corpus of `data` with the tokenizer of `tokenizer`, or find it prepared in ``data.cache``.

    Raises:
        UserError: a path or field is wrong, or there is too little text.
        NautileError: the disk is full or not writable; nothing half-made remains.
    """
    data.check()
    tokenizer.check()
    existing = _existing_tokenizer(tokenizer)
    source = open_source(data)
    name = fingerprint(data, tokenizer, source, existing)
    folder = Path(data.cache) / name
    if (folder / _REPORT).is_file():
        log(f"data: reusing {folder}, prepared earlier from the same text and settings")
        return PreparedData.open(folder)

    clock = _Clock()
    corpus = Corpus(data, source)
    _say_what_was_found(corpus, data)
    clock.stop("survey")
    with atomic_folder(folder) as partial:
        chosen = existing or train_tokenizer(corpus.training_texts(tokenizer.train_megabytes), tokenizer.vocab_size)
        chosen.save(partial / "tokenizer")
        clock.stop("tokenizer")
        splits = _write_tokens(corpus, chosen, data, partial)
        clock.stop("tokens")
        report = {"fingerprint": name, **_describe(corpus, data), **splits, "seconds": clock.seconds}
        (partial / _REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")
    prepared = PreparedData.open(folder, reused=False)
    log(
        f"data: {prepared.train.num_tokens:,} training and {prepared.validation.num_tokens:,} validation tokens, "
        f"{report['bytes_per_token']:.2f} bytes each, in {sum(clock.seconds.values()):.1f} s → {folder}"
    )
    return prepared


def fingerprint(data: DataConfig, tokenizer: TokenizerConfig, source: Source, existing: Tokenizer | None = None) -> str:
    """Hash of the settings, of the source's inventory (names, sizes, times of files; the interpreter's version), of the
    `existing` tokenizer's content, wherever it lies, and of the version of the library that cuts text into tokens.

    Texts are not read for it, so that a finished corpus of any size is recognised at once; text changed within the
    same size and modification time goes unnoticed.
    """
    parts = {
        "format": FORMAT,
        "data": {**to_mapping(data), "cache": ""},
        "tokenizer": {**to_mapping(tokenizer), "path": ""},
        "rules": existing.digest() if existing else RULES,
        "tokenizers": tokenizers.__version__,
        "inventory": source.inventory(),
    }
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def read_documents(shards: TokenShards, tokenizer: Tokenizer, n: int, special: bool = False) -> list[tuple[str, str]]:
    """(name, text) of the first `n` documents of a split; `special` shows the special tokens, too."""
    names = shards.names()[:n]
    return [(name, tokenizer.decode(shards.document(index), not special)) for index, name in enumerate(names)]


def _existing_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    if not config.path:
        return None
    tokenizer = Tokenizer.load(config.path)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer {config.path} has {tokenizer.vocab_size} ids, but vocab_size is {config.vocab_size}",
            "the model would have no row for some of its tokens",
            f"set tokenizer.vocab_size and model.vocab_size to {tokenizer.vocab_size} or more",
        )
    return tokenizer


def _write_tokens(corpus: Corpus, tokenizer: Tokenizer, data: DataConfig, folder: Path) -> dict[str, Any]:
    """Tokenise every document into its split; the figures of both, for the report."""
    lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)], dtype=np.int64)
    shard_tokens = max(int(data.shard_megatokens * 1e6), 1)
    train = ShardWriter(folder / "train", lengths, shard_tokens)
    validation = ShardWriter(folder / "validation", lengths, shard_tokens)
    held_out: list[tuple[bytes, str, list[int]]] = []
    rearranged = 0
    with progress("data: documents tokenised", corpus.survey.documents) as bar:
        for entries in _chunks(corpus):
            plans = [_plan(entry, corpus.holds_out(entry), data) for entry in entries]
            encoded = iter(tokenizer.encode_batch([part for plan in plans for sample in plan for part in sample]))
            for entry, plan in zip(entries, plans, strict=True):
                rearranged += len(plan[0]) == 3
                for sample in plan:
                    tokens = _assemble([next(encoded) for _ in sample], tokenizer)
                    if corpus.holds_out(entry):
                        held_out.append((entry.digest, entry.document.name, tokens))
                    else:
                        train.add(entry.document.name, tokens)
            bar.advance(len(entries))
    for _, name, tokens in sorted(held_out):
        validation.add(name, tokens)
    train.close()
    validation.close()
    num_tokens = train.num_tokens + validation.num_tokens
    return {
        "train": _split_figures(train),
        "validation": _split_figures(validation),
        "rearranged_documents": rearranged,
        "bytes_per_token": (train.num_bytes + validation.num_bytes) / num_tokens,
    }


def _chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries in lists of about `_CHUNK_BYTES` of text."""
    chunk: list[Entry] = []
    size = 0
    for entry in entries:
        chunk.append(entry)
        size += entry.num_bytes
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _plan(entry: Entry, held_out: bool, data: DataConfig) -> list[tuple[str, ...]]:
    """What to tokenise of a document: its text as one, or, where the middle moves, each span in three parts."""
    key, text = f"{data.seed} {entry.digest.hex()}", entry.document.text
    if held_out or not fim.chosen(key, data.fim_rate):
        return [(text,)]
    wholes = spans(text, data.fim_span) if data.fim_span else [text]
    cuts = [fim.cut(whole, f"{key} {number}") for number, whole in enumerate(wholes)]
    return [(cut.prefix, cut.middle, cut.suffix) for cut in cuts]


def _assemble(parts: list[list[int]], tokenizer: Tokenizer) -> list[int]:
    """A packed document: beginning token, text or prefix-suffix-middle, end token."""
    body = parts[0] if len(parts) == 1 else fim.to_psm(*parts, tokenizer=tokenizer)
    return [tokenizer.bos_id, *body, tokenizer.eos_id]


def _describe(corpus: Corpus, data: DataConfig) -> dict[str, Any]:
    survey = corpus.survey
    left_out = {
        reason: {"count": n, "examples": survey.skipped.examples[reason]} for reason, n in survey.skipped.counts.items()
    }
    return {
        "source": data.source,
        "documents": survey.documents,
        "bytes": survey.num_bytes,
        "duplicates": survey.duplicates,
        "empty": survey.empty,
        "skipped": left_out,
    }


def _split_figures(writer: ShardWriter) -> dict[str, int]:
    return {"documents": writer.num_documents, "bytes": writer.num_bytes, "tokens": writer.num_tokens}


def _say_what_was_found(corpus: Corpus, data: DataConfig) -> None:
    survey = corpus.survey
    log(
        f"data: source {data.source}: {survey.documents:,} documents, {survey.num_bytes / 1e6:.1f} MB "
        f"({survey.duplicates} duplicates and {survey.empty} empty ones left out)"
    )
    if survey.skipped.counts:
        warn(f"data: not used: {survey.skipped.describe()}")


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def stop(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self._since = round(now - self._since, 3), now
