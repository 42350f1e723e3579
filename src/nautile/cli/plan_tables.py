"""The tables of ``nautile plan``."""

from rich.console import Console
from rich.table import Table

ATTENTION_NOTE = {
    "prefill": "forward, mean over a causal sequence of {length}",
    "decode": "one token after {length} cached ones",
    "training": "forward and backward, sequences of {length}",
    "training_mtp": "what the MTP modules add to training",
}


def print_plan(report: dict) -> None:
    """Print everything on stdout: as wide as a terminal, 100 columns elsewhere."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    console.print(f"[bold]{report['model']}[/bold] ({report['from']}), context {report['context']:,} tokens\n")
    for table in (parameter_table, flops_table, cache_table, memory_table):
        console.print(table(report))


def parameter_table(report: dict) -> Table:
    """Parameters by part."""
    counts = report["parameters"]
    table = _table("parameters", "part", "total", "", "active per token", "")
    for part in counts["parts"]:
        table.add_row(part["name"], *_count(part["total"]), *_count(part["active"]))
    table.add_section()
    main, mtp = counts["main_model"], counts["mtp_modules"]
    table.add_row("main model", *_count(main["total"]), *_count(main["active"]), style="bold")
    if mtp["total"]:
        table.add_row("MTP modules", *_count(mtp["total"]), *_count(mtp["active"]))
        table.add_row("with MTP", *_count(counts["with_mtp"]), "", "")
    if "published_fp8_checkpoint" in counts:
        numbers = counts["published_fp8_checkpoint"]["numbers"]
        table.add_row("numbers in an FP8 checkpoint", *_count(numbers), "", "")
        table.caption = "an FP8 checkpoint repeats embedding and head in each MTP module and holds block scales"
    return table


def flops_table(report: dict) -> Table:
    """FLOPs per token."""
    table = _table("FLOPs per token", "", "weights", "attention", "all")
    for name, cost in report["flops_per_token"].items():
        note = ATTENTION_NOTE[name].format(length=f"{report['sequence_length']:,}")
        numbers = [_scaled(cost[key], "FLOP", 1000) for key in ("weights", "attention", "all")]
        table.add_row(f"{name.replace('_', ', ')}: {note}", *numbers)
    return table


def cache_table(report: dict) -> Table:
    """Cache per token, all layers together."""
    rows = report["kv_cache_per_token"]
    references = {"saved_against_mha": "against MHA", "saved_against_deepseek_67b": "against 67B"}
    shown = {key: title for key, title in references.items() if key in rows[0]}
    table = _table("cache per token", "", "elements", "bits", "bytes", *shown.values())
    for row in rows:
        saved = [_saving(row[key]) for key in shown]
        table.add_row(row["name"], f"{row['elements']:,}", str(row["bits"]), _scaled(row["bytes"], "B"), *saved)
    return table


def _saving(part: float) -> str:
    return f"{100 * part:.1f} % less" if part > 0 else f"{1 - part:.3g} ×"


def memory_table(report: dict) -> Table:
    """Training and inference memory."""
    training, inference = report["training_memory"], report["inference_memory"]
    batch = f"{report['batch_size']} × {report['sequence_length']:,} tokens"
    columns = [f"training, {training['precision']}"]
    ranks = [training["one_rank"]]
    if "planned_zero1" in training:
        columns.append(f"plan: ZeRO-1, {training['planned_zero1']['ranks']} ranks")
        ranks.append(training["planned_zero1"])
    table = _table(f"memory per rank, {batch}", "", *columns, "inference, bf16")
    rows = {
        "weights": "weights",
        "gradients": "gradients",
        "moments": "optimiser moments",
        "casts": "bf16 copies",
        "activations": "activations (estimate)",
        "cache": "cache",
    }
    for key, name in rows.items():
        cells = [_scaled(memory[key], "B") if memory.get(key) else "" for memory in [*ranks, inference]]
        if any(cells):
            table.add_row(name, *cells)
    table.add_section()
    table.add_row("total", *[_scaled(memory["total"], "B") for memory in [*ranks, inference]], style="bold")
    if len(ranks) > 1:
        table.caption = "nautile trains on one rank today; the ZeRO-1 column is arithmetic, not a feature"
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", expand=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _count(number: int) -> tuple[str, str]:
    """A parameter count in full and in millions or billions."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number:,}", f"{number / size:.1f} {unit}"
    return f"{number:,}", ""


def _scaled(number: float, unit: str, base: int = 1024) -> str:
    """With a prefix: powers of 1024 for bytes (KiB), of 1000 for FLOPs."""
    infix = "i" if base == 1024 else ""
    for prefix in ("", "K", "M", "G", "T"):
        if number < base or prefix == "T":
            return f"{number:.4g} {prefix}{infix if prefix else ''}{unit}"
        number /= base
    raise AssertionError
