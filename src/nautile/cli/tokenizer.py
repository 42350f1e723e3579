"""``nautile tokenizer``: train a tokenizer, or look at what one does to a text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from nautile.cli.actions import run_action
from nautile.cli.flags import parse
from nautile.core.errors import UserError
from nautile.core.log import log
from nautile.data.config import DataConfig
from nautile.text.config import TokenizerConfig

if TYPE_CHECKING:
    from nautile.text.tokenizer import Tokenizer

TRAIN_EXAMPLES = (
    "nautile tokenizer train --out my-tokenizer --tokenizer.vocab-size 8192",
    "nautile tokenizer train --out my-tokenizer --data.source files --data.paths my-texts",
)
SHOW_EXAMPLES = (
    'nautile tokenizer show my-tokenizer "def add(a, b): return a + b"',
    'nautile tokenizer show runs/demo/model "<｜User｜>Hello" --parse-special',
)


@dataclass(frozen=True)
class TrainArgs:
    """What ``nautile tokenizer train`` learns from and where it writes."""

    out: Path
    """New folder for tokenizer.json and tokenizer_config.json."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus; only its training split is read."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Size, and how much text to learn from."""


@dataclass(frozen=True)
class ShowArgs:
    """What ``nautile tokenizer show`` cuts up."""

    path: tyro.conf.Positional[Path]
    """A tokenizer.json, or the folder of a model or tokenizer that holds one."""
    text: tyro.conf.Positional[str]
    """Text to cut into tokens."""
    parse_special: bool = False
    """Read names such as <｜User｜> in the text as special tokens."""


def main(argv: Sequence[str]) -> int:
    """Run the action that the first word names."""
    actions = {
        "train": (_train, "learn a byte-level BPE vocabulary from a corpus"),
        "show": (_show, "the tokens of a text, one a line"),
    }
    examples = (TRAIN_EXAMPLES[0], SHOW_EXAMPLES[0])
    return run_action("nautile tokenizer", "Train a tokenizer, or look at one.", actions, examples, argv)


def _train(argv: Sequence[str]) -> int:
    description = "Learn a byte-level BPE vocabulary from the training split of a corpus."
    args = parse(TrainArgs, None, argv, "nautile tokenizer train", description, TRAIN_EXAMPLES)
    if args.tokenizer.path:
        raise UserError(
            f"--tokenizer.path {args.tokenizer.path} names an existing tokenizer",
            "this command trains a new one",
            f"look at it instead: nautile tokenizer show {args.tokenizer.path} TEXT",
        )
    if (args.out / "tokenizer.json").exists():
        raise UserError(
            f"{args.out} already holds a tokenizer",
            "models trained with it would no longer understand their own tokens",
            "choose another folder with --out",
        )

    from nautile.data.corpus import Corpus, open_source
    from nautile.text.tokenizer import train_tokenizer

    args.data.check()
    args.tokenizer.check()
    corpus = Corpus(args.data, open_source(args.data))
    log(f"tokenizer: learning from {corpus.survey.documents:,} documents, {corpus.survey.num_bytes / 1e6:.1f} MB")
    learnt = train_tokenizer(corpus.training_texts(args.tokenizer.train_megabytes), args.tokenizer.vocab_size)
    learnt.save(args.out)
    print(f"{args.out}: {learnt.vocab_size:,} token ids")
    log(f"next: nautile data prepare --tokenizer.path {args.out} --tokenizer.vocab-size {learnt.vocab_size}")
    return 0


def _show(argv: Sequence[str]) -> int:
    args = parse(ShowArgs, None, argv, "nautile tokenizer show", "The tokens of a text, one a line.", SHOW_EXAMPLES)

    from nautile.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.path)
    ids = tokenizer.encode(args.text, args.parse_special)
    for token_id in ids:
        print(f"{token_id:>8}  {_spelling(tokenizer, token_id)}")
    size = len(args.text.encode())
    print(f"{len(ids)} tokens of {tokenizer.vocab_size:,} ids for {size} bytes, {size / max(len(ids), 1):.2f} each")
    return 0


def _spelling(tokenizer: "Tokenizer", token_id: int) -> str:
    """A token as Python writes it: a str, or bytes where it is a part of a character."""
    spelling = tokenizer.token_bytes(token_id, skip_special_tokens=False)
    try:
        return repr(spelling.decode())
    except UnicodeDecodeError:
        return repr(spelling)
