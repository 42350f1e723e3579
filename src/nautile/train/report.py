"""The report of a run, rendered from its records alone: report.html (self-contained) and report.md."""

import base64
import json
from pathlib import Path
from typing import Any

from nautile.core.errors import UserError
from nautile.core.run_folder import RunFolder, atomic_write_text
from nautile.train import figures

TEMPLATES = Path(__file__).parent


def render(run: RunFolder) -> Path:
    """Write report.md and report.html of a run, finished or not; return the path of the latter.

    Raises:
        UserError: the run has not recorded anything yet.
        NautileError: the disk is full or not writable.
    """
    import jinja2

    summary, lines = run.read_summary(), run.read_metrics()
    if summary is None or not any("loss" in line for line in lines):
        raise UserError(
            f"{run.path} has no steps to report",
            "metrics.jsonl or summary.json is missing or empty",
            f"train first: nautile pretrain --resume {run.path}",
        )
    content = _content(run, summary, lines)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        keep_trailing_newline=True,
    )
    with run.resumable():
        for name in ("report.md", "report.html"):
            atomic_write_text(run.path / name, environment.get_template(f"{name}.j2").render(content))
    return run.path / "report.html"


def _content(run: RunFolder, summary: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    samples = run.samples.read()
    return {
        "name": summary["name"],
        "verdict": _verdict(summary),
        "cards": _cards(summary, lines),
        "sections": _sections(summary, lines),
        "validation": [(line["step"], line["val_bits_per_byte"]) for line in lines if "val_bits_per_byte" in line],
        "samples": [sample for sample in samples if sample["step"] == samples[-1]["step"]],
        "tables": _tables(run, summary),
        "next": summary.get("next") or [f"nautile pretrain --resume {run.path}"],
    }


def _verdict(summary: dict[str, Any]) -> str:
    progress = f"{summary['step']} of {summary['steps']} steps"
    if summary.get("val_bits_per_byte") is None:
        return f"Not finished: {progress}."
    ratio = summary["val_bits_per_byte"] / summary["bigram_bits_per_byte"]
    return (
        f"After {progress} the model needs {summary['val_bits_per_byte']:.3f} bits per byte of text it never saw, "
        f"{ratio:.2f} times what a bigram model needs ({summary['bigram_bits_per_byte']:.3f})."
    )


def _cards(summary: dict[str, Any], lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    last = [line for line in lines if "loss" in line][-1]
    cards = [
        (f"{summary['parameters'] / 1e6:.2f} M", "parameters"),
        (f"{last['tokens'] / 1e6:.2f} M", "tokens trained on"),
    ]
    if summary.get("wall_seconds"):
        cards.append((_duration(summary["wall_seconds"]), "wall time"))
    if summary.get("tokens_per_second"):
        cards.append((f"{summary['tokens_per_second']:,.0f}", "tokens per second"))
        cards.append((f"{summary['gflops']:,.0f}", "GFLOP/s of model arithmetic"))
        if peak := summary["gemm_peak_gflops"]:
            cards.append((f"{summary['gflops'] / peak:.0%}", f"of this machine's {_of_peak(summary)} peak"))
    if summary.get("load_max_over_mean"):
        cards.append((f"{summary['load_max_over_mean']:.2f}", "busiest expert / mean"))
    return cards


def _of_peak(summary: dict[str, Any]) -> str:
    """The precision that the peak was measured in: FP8 is emulated where it is measured."""
    return "bf16" if summary["precision"] == "fp8" else summary["precision"]


def _sections(summary: dict[str, Any], lines: list[dict[str, Any]]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    trained = [line for line in lines if "loss" in line]
    curves = [("Learning rate", figures.schedule_figure(trained)), ("Throughput", figures.speed_figure(trained))]
    if trained[0]["mtp_loss"]:
        curves.insert(0, ("Multi-token prediction", figures.mtp_figure(trained)))
    sections = [
        (
            "Loss",
            "Bits per byte do not depend on the tokenizer. The dashed lines are what counting gets: single tokens "
            "(unigram) and pairs (bigram), on the same held-out text.",
            [("", figures.loss_figure(lines, summary))],
        ),
        ("On the way", "", curves),
    ]
    if trained[0]["expert_counts"]:
        curves.append(("Expert load", figures.balance_figure(trained)))
        sections.append(
            (
                "Expert load",
                "Tokens per expert over the mean of its layer: white is balanced, red busy, blue idle. Each step the "
                "router's biases move against the load; there is no token dropping. The MTP modules come last.",
                [("", figures.heat_map_figure(trained))],
            )
        )
    return [(title, note, [(caption, _as_source(svg)) for caption, svg in panels]) for title, note, panels in sections]


def _tables(run: RunFolder, summary: dict[str, Any]) -> list[tuple[str, str, list[str] | None, list[list[str]]]]:
    env_path = run.path / "env.json"
    env = json.loads(env_path.read_text("utf-8")) if env_path.exists() else {}
    peak = summary["gemm_peak_gflops"]
    machine = [
        ["processor", f"{env.get('cpu')}, {env.get('cores')} cores, {env.get('threads')} threads"],
        ["device", f"{summary['device']}, {summary['precision']}"],
        ["measured matrix-product peak", f"{peak:,.0f} GFLOP/s ({_of_peak(summary)})" if peak else "not measured"],
        ["training arithmetic", f"{summary['training_flops_per_token'] / 1e6:,.1f} MFLOP per token"],
        ["versions", ", ".join(f"{name} {version}" for name, version in env.get("versions", {}).items())],
        ["command", " ".join(env.get("command", []))],
    ]
    backends = [
        [choice["op"], choice["backend"], "; ".join(f"{b}: {why}" for b, why in choice["passed_over"].items()) or "–"]
        for choice in summary["backends"]
    ]
    data = [[key.replace("_", " "), _plain(value)] for key, value in summary["data"].items()]
    return [
        ("Machine", "", None, machine),
        ("Kernels", "The first backend without a reason against it runs.", ["op", "runs on", "passed over"], backends),
        ("Data", "", None, data),
    ]


def _as_source(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
