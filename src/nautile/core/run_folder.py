"""The folder that holds one run: its resolved config, its records, its checkpoints and its exported model.

runs/NAME/
    config.yaml       the resolved recipe, itself a valid recipe
    env.json          machine, versions, command
    metrics.jsonl     one object per logged step, with "step"
    samples.jsonl     texts the model wrote on the way
    summary.json      the final figures
    checkpoints/      step-000400/ ...
    model/            the exported model, readable by transformers
    report.md, report.html
    .lock             held, in the sense of flock, by the process that trains; its presence means nothing
"""

import json
import math
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nautile.core.atomic import atomic_folder, atomic_write_text, disk_errors
from nautile.core.errors import DiskFullError, UserError
from nautile.core.folder_lock import locked_folder
from nautile.core.nearest import suggestion

__all__ = ["JsonLines", "RunFolder", "atomic_folder", "atomic_write_text"]


@dataclass(frozen=True)
class JsonLines:
    """A file of one JSON object per line, appended to by one process and readable at any moment."""

    path: Path
    """The file; it need not exist yet."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line and flush it, so that a killed process loses at most the line it was writing.

        JSON has no NaN or infinity: they become null.

        Raises:
            NautileError: the disk is full or not writable.
        """
        line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"
        with disk_errors(self.path):
            _cut_torn_line(self.path)
            with self.path.open("ab") as file:
                file.write(line.encode())

    def read(self) -> list[dict[str, Any]]:
        """Every whole line; a last line cut off by a kill is left out."""
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()]

    def keep(self, records: list[dict[str, Any]]) -> None:
        """Replace the contents by `records`, atomically."""
        atomic_write_text(self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


class RunFolder:
    """Paths and records of one run. Build it with `create` or `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.samples = JsonLines(path / "samples.jsonl")

    @classmethod
    def create(cls, path: Path | str) -> "RunFolder":
        """Start a run in `path`, which must not hold one already.

        Raises:
            UserError: `path` is a file or holds a run.
            NautileError: `path` cannot be made.
        """
        run = cls(Path(path))
        if run.config_path.exists():
            raise UserError(
                f"{path} already holds a run",
                "a second run would mix its records with the first one's",
                f"continue it with --resume {path}, or choose another folder with --out",
            )
        if run.path.exists() and not run.path.is_dir():
            raise UserError(f"{path} is a file", "a run needs a folder", "choose another folder with --out")
        with disk_errors(run.path):
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        return run

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """The run in `path`.

        Raises:
            UserError: there is none; the message names the nearest run beside it.
        """
        run = cls(Path(path))
        if run.config_path.exists():
            return run
        beside = sorted(str(config.parent) for config in run.path.parent.glob("*/config.yaml"))
        raise UserError(
            f"{path} holds no run",
            "there is no config.yaml in it" if run.path.exists() else "there is no such folder",
            suggestion(str(path), beside, "runs beside it") if beside else "start one: nautile demo",
        )

    @contextmanager
    def locked(self) -> Generator[None]:
        """Keep other processes from training in this folder while the block runs.

        The kernel holds the lock (flock) and drops it when the process ends, however it ends. There is none on Windows,
        nor on a network file system that offers none, which is said.

        Raises:
            UserError: another process holds it.
            NautileError: the folder is not writable.
        """
        with locked_folder(
            self.path,
            f"another process is training in {self.path}",
            "two would delete each other's checkpoints and mix their records",
            "wait until it ends or stop it, or choose another folder with --out",
        ):
            yield

    @contextmanager
    def resumable(self) -> Generator[None]:
        """Where the block fills the disk after the run began, name the command that continues it.

        Raises:
            DiskFullError: in the block; the command that began a run would be refused now.
        """
        try:
            yield
        except DiskFullError as error:
            if not self.config_path.exists():
                raise
            cure = f"free some space on that disk, then: nautile pretrain --resume {self.path}"
            raise DiskFullError(error.what, error.why, cure) from error

    @property
    def config_path(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def summary_path(self) -> Path:
        """The final figures."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The folder of the exported model."""
        return self.path / "model"

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, in the order of their steps."""
        return self.metrics.read()

    def truncate_metrics_after(self, step: int) -> None:
        """Drop metrics and samples past `step`, so that steps only grow after resuming from that checkpoint."""
        for records in (self.metrics, self.samples):
            if records.path.exists():
                records.keep([record for record in records.read() if record.get("step", 0) <= step])

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the final figures, replacing earlier ones whole."""
        text = json.dumps(_finite(summary), indent=2, ensure_ascii=False, allow_nan=False)
        atomic_write_text(self.summary_path, text + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """The final figures, or None while the run has not ended."""
        return json.loads(self.summary_path.read_text("utf-8")) if self.summary_path.exists() else None

    def write_env(self) -> None:
        """Record what the run ran on and how it was called."""
        from nautile.core import machine

        env = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], **machine.describe()}
        atomic_write_text(self.path / "env.json", json.dumps(env, indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _cut_torn_line(path: Path) -> None:
    """Drop what a killed process left after the last line break, so that the next line stands alone."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
