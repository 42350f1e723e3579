"""Which text a run trains on, and how it is turned into tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nautile.core.errors import UserError
from nautile.core.nearest import nearest


@dataclass(frozen=True)
class DataConfig:
    """A corpus and its preparation."""

    source: Literal["python", "files"] = "python"
    """python: the standard library and the language reference of the running interpreter; files: those in `paths`."""
    paths: tuple[str, ...] = ()
    """With source files: text, .jsonl and .parquet files, and folders, which are read with all that is in them."""
    text_field: str = "text"
    """Key or column that holds the text in .jsonl and .parquet files."""
    max_megabytes: float | None = None
    """About how much of the corpus to use, every n-th document of it; null for all of it."""
    validation_fraction: float = 0.05
    """Share of the documents held out; a document's own hash decides, so a growing corpus keeps its split."""
    fim_rate: float = 0.1
    """Share of the training documents rearranged for fill-in-the-middle (V3: 0.1, DeepSeek-Coder: 0.5)."""
    fim_span: int = 0
    """Longest text, in characters, rearranged as one, to fit a window; 0: whole documents, as in the papers."""
    shard_megatokens: float = 64.0
    """Size of one token file, in millions of tokens."""
    cache: str = "runs/data"
    """Folder under which prepared corpora are kept, each named by what it was made from."""
    seed: int = 0
    """Chooses which documents are rearranged and where they are cut."""

    def check(self) -> None:
        """Raise `UserError` if a field cannot be met."""
        for name, value, allowed in (
            ("validation_fraction", self.validation_fraction, 0 < self.validation_fraction < 1),
            ("fim_rate", self.fim_rate, 0 <= self.fim_rate <= 1),
        ):
            if not allowed:
                raise UserError(
                    f"data: {name} {value} is not possible", "it is a share", "use a number between 0 and 1"
                )
        for name, value, allowed in (
            ("fim_span", self.fim_span, self.fim_span >= 0),
            ("shard_megatokens", self.shard_megatokens, self.shard_megatokens > 0),
            ("max_megabytes", self.max_megabytes, self.max_megabytes is None or self.max_megabytes > 0),
        ):
            if not allowed:
                raise UserError(f"data: {name} {value} is not possible", "it is an amount", "use a positive number")
        self._check_paths()

    def _check_paths(self) -> None:
        if self.source == "python" and self.paths:
            raise UserError(
                f"data: paths {', '.join(self.paths)} are not used by source python",
                "source python reads the interpreter's own library",
                "set data.source to files, or remove data.paths",
            )
        if self.source == "files" and not self.paths:
            raise UserError(
                "data: source files without paths",
                "there is nothing to read",
                "name files or folders, e.g. --data.source files --data.paths my-texts",
            )
        for path in map(Path, self.paths):
            if not path.exists():
                beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
                near = nearest(path.name, beside)
                cure = f"did you mean {path.parent / near}?" if near else "correct data.paths"
                raise UserError(f"data: {path} does not exist", "data.paths names it", cure)
