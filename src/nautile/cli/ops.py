"""``nautile ops``: every kernel, the backend that runs it here, and why faster ones do not."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from nautile.cli.flags import parse

if TYPE_CHECKING:
    from nautile.ops.dispatch import Choice

EXAMPLES = ("nautile ops", "nautile ops --dtype bf16", "nautile ops --device cuda --json")


@dataclass(frozen=True)
class OpsArgs:
    """Where and in what the ops would run."""

    device: str | None = None
    """Device of the tensors: cpu, cuda, cuda:1, ... Default: cuda if there is one, else cpu."""
    dtype: str = "fp32"
    """Type of the tensors: fp32, bf16 or fp16. Ops on FP8 numbers are asked for float8_e4m3fn whatever this says."""
    json: bool = False
    """Print a JSON list instead of a table."""


def main(argv: Sequence[str]) -> int:
    """Ask every backend of every op, print."""
    description = (
        "Every op, the backend that would run it, and why the faster ones before it would not.\n\n"
        "NAUTILE_OPS=reference (or another backend) forces one."
    )
    args = parse(OpsArgs, None, argv, "nautile ops", description, EXAMPLES)
    import torch

    from nautile.models.placement import torch_device, torch_dtype
    from nautile.ops.dispatch import choices

    device = torch_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch_dtype(args.dtype, {})
    rows = choices(device, dtype)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _print(rows, f"{device}, {args.dtype}")
    return 0


def _print(rows: "list[Choice]", where: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from nautile.core import jit
    from nautile.ops.dispatch import TABLE

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    table = Table(title=f"ops on {where}", title_justify="left", title_style="bold", expand=False)
    for column in ("op", "runs on", "slower", "passed over, because"):
        table.add_column(column, no_wrap=column == "op")
    for row in rows:
        reasons = "; ".join(f"{backend}: {reason}" for backend, reason in row.passed_over.items())
        backends = TABLE[row.op][1]
        slower = [name for name in backends if name != row.backend and name not in row.passed_over]
        table.add_row(row.op, row.backend, ", ".join(slower), reasons)
    console.print(table)
    without = jit.why_no_cxx()
    if without and any(row.backend == "cpu" for row in rows):
        console.print(f"cpu runs plain torch, without the C++ of decoding: {without}")
