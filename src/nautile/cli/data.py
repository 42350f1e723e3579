"""``nautile data``: turn text into packed token shards, and look at the result."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from nautile.cli.actions import run_action
from nautile.cli.flags import parse
from nautile.core.errors import UserError
from nautile.data.config import DataConfig
from nautile.text.config import TokenizerConfig

if TYPE_CHECKING:
    from nautile.data.prepare import PreparedData

PREPARE_EXAMPLES = (
    "nautile data prepare --data.source files --data.paths my-texts notes.jsonl",
    "nautile data prepare --tokenizer.vocab-size 8192",
)
SHOW_EXAMPLES = (
    "nautile data show runs/data/0123456789abcdef",
    "nautile data show runs/data/0123456789abcdef --split train --documents 5",
)


@dataclass(frozen=True)
class PrepareArgs:
    """What ``nautile data prepare`` reads and makes."""

    data: DataConfig = field(default_factory=DataConfig)
    """Corpus."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class ShowArgs:
    """What ``nautile data show`` prints."""

    folder: tyro.conf.Positional[Path]
    """Folder of a prepared corpus, as ``nautile data prepare`` names it."""
    split: Literal["train", "validation"] = "validation"
    """Split whose documents are shown."""
    documents: int = 2
    """How many documents to show, decoded from their tokens."""
    characters: int = 400
    """How much of each, from its beginning."""
    json: bool = False
    """Print one JSON object instead."""


def main(argv: Sequence[str]) -> int:
    """Run the action that the first word names."""
    actions = {
        "prepare": (_prepare, "read a corpus, train its tokenizer, write token shards; finds finished work again"),
        "show": (_show, "figures and some decoded documents of a prepared corpus"),
    }
    examples = (PREPARE_EXAMPLES[0], SHOW_EXAMPLES[0])
    return run_action("nautile data", "Turn text into packed token shards.", actions, examples, argv)


def _prepare(argv: Sequence[str]) -> int:
    description = "Read a corpus, hold some of it out, and write packed token shards. Finished work is found again."
    args = parse(PrepareArgs, PrepareArgs(), argv, "nautile data prepare", description, PREPARE_EXAMPLES)

    from nautile.data.prepare import prepare

    prepared = prepare(args.data, args.tokenizer)
    print(_as_json(prepared) if args.json else figures(prepared))
    return 0


def _show(argv: Sequence[str]) -> int:
    description = "Figures and some decoded documents of a prepared corpus."
    args = parse(ShowArgs, None, argv, "nautile data show", description, SHOW_EXAMPLES)
    if args.documents < 0 or args.characters < 1:
        raise UserError(
            f"--documents {args.documents} --characters {args.characters} is not possible",
            "they count what is shown",
            "use --documents 0 or more and --characters 1 or more",
        )

    from nautile.data.prepare import PreparedData, read_documents

    prepared = PreparedData.open(args.folder)
    shards = prepared.train if args.split == "train" else prepared.validation
    documents = read_documents(shards, prepared.tokenizer, args.documents, special=True)
    shown = [{"name": name, "text": text[: args.characters]} for name, text in documents]
    if args.json:
        print(_as_json(prepared, {"documents_shown": shown}))
        return 0
    print(figures(prepared))
    for document in shown:
        print(f"\n── {args.split}: {document['name']}\n{document['text']}")
    return 0


def figures(prepared: "PreparedData") -> str:
    """The report of a prepared corpus as a table."""
    report = prepared.report
    lines = [
        f"{prepared.folder}: source {report['source']}, {prepared.tokenizer.vocab_size:,} token ids",
        f"{'':12}{'documents':>12}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}",
    ]
    for split in ("train", "validation"):
        row = report[split]
        ratio = row["bytes"] / row["tokens"]
        lines.append(f"{split:12}{row['documents']:>12,}{row['bytes']:>16,}{row['tokens']:>16,}{ratio:>13.2f}")
    lines.append(
        f"left out: {report['duplicates']} duplicates, {report['empty']} empty; "
        f"rearranged for fill-in-the-middle: {report['rearranged_documents']} documents"
    )
    for reason, skipped in report["skipped"].items():
        lines.append(f"skipped: {skipped['count']} {reason}: {', '.join(skipped['examples'][:5])}")
    return "\n".join(lines)


def _as_json(prepared: "PreparedData", more: dict[str, Any] | None = None) -> str:
    return json.dumps({"folder": str(prepared.folder), **prepared.report, **(more or {})}, ensure_ascii=False, indent=1)
