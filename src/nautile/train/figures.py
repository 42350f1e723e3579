"""Figures of the training report, drawn from the lines of metrics.jsonl. Each returns an SVG document as text."""

import io
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, TEAL, ORANGE, PLUM = "#1c2b33", "#7b8a93", "#0f7b7b", "#d9772b", "#7a4b94"
MAX_LAYERS = 12
"""Heat maps shown; of deeper models evenly spaced layers."""

Lines = Sequence[dict[str, Any]]
P = ParamSpec("P")


def _figure(width: float, height: float) -> Callable[..., Callable[..., str]]:
    """Give the decorated function a styled figure to draw into, and return what it drew as SVG."""

    def decorate(draw: Callable[Concatenate["Figure", P], None]) -> Callable[P, str]:
        @wraps(draw)
        def render(*args: P.args, **kwargs: P.kwargs) -> str:
            import matplotlib as mpl
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator

            with mpl.rc_context(_style()):
                figure = Figure(figsize=(width, height), layout="constrained")
                draw(figure, *args, **kwargs)
                for axis in (axes.xaxis for axes in figure.axes):  # the steps; there is no step 2.5
                    if isinstance(locator := axis.get_major_locator(), MaxNLocator):
                        locator.set_params(integer=True)
                file = io.StringIO()
                figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
            return file.getvalue()

        return render

    return decorate


@_figure(9.6, 3.6)
def loss_figure(figure: "Figure", lines: Lines, summary: dict[str, Any]) -> None:
    """Training and held-out loss in bits per byte, beside the two baselines."""
    axes = figure.subplots()
    trained = [line for line in lines if "loss" in line]
    to_bits = summary["tokens_per_byte"] / math.log(2)
    axes.plot(_steps(trained), [line["loss"] * to_bits for line in trained], color=TEAL, lw=1.3, label="training batch")
    validated = [(line["step"], line["val_bits_per_byte"]) for line in lines if "val_bits_per_byte" in line]
    if summary.get("val_bits_per_byte") is not None:
        validated.append((summary["step"], summary["val_bits_per_byte"]))
    if validated:
        axes.plot(*zip(*validated, strict=True), "o-", color=ORANGE, ms=5, lw=1, label="held-out text")
    for name in ("unigram", "bigram"):
        height = summary[f"{name}_bits_per_byte"]
        axes.axhline(height, color=SOFT, lw=1, ls=(0, (4, 3)))
        axes.annotate(
            f"{name} {height:.2f}", (1, height), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", color=SOFT, fontsize=8,
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    axes.legend(loc="lower left")


@_figure(4.7, 2.9)
def mtp_figure(figure: "Figure", lines: Lines) -> None:
    """Cross-entropy of the next token and of the tokens that the MTP modules predict."""
    axes = figure.subplots()
    axes.plot(_steps(lines), [line["loss"] for line in lines], color=TEAL, lw=1.2, label="next token")
    for depth in range(len(lines[0]["mtp_loss"])):
        losses = [line["mtp_loss"][depth] for line in lines]
        axes.plot(_steps(lines), losses, color=PLUM, lw=1.2, alpha=0.5**depth, label=f"{depth + 2} tokens ahead (MTP)")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend(loc="upper right")


@_figure(4.7, 2.9)
def schedule_figure(figure: "Figure", lines: Lines) -> None:
    """Learning rate, and where the MTP weight and the bias speed change."""
    axes = figure.subplots()
    axes.plot(_steps(lines), [line["lr"] for line in lines], color=TEAL, lw=1.4)
    for key, symbol, color in (("mtp_weight", "λ", PLUM), ("bias_speed", "γ", ORANGE)):
        for before, after in zip(lines, lines[1:], strict=False):
            if before[key] != after[key]:
                axes.axvline(after["step"], color=color, lw=1, ls=(0, (2, 2)))
                axes.annotate(
                    f"{symbol} {before[key]:g} → {after[key]:g}", (after["step"], 0.03),
                    xycoords=("data", "axes fraction"), xytext=(-3, 0), textcoords="offset points",
                    ha="right", va="bottom", rotation=90, color=color, fontsize=8,
                )  # fmt: skip
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


@_figure(4.7, 2.9)
def balance_figure(figure: "Figure", lines: Lines) -> None:
    """Busiest expert over the mean, per MoE layer."""
    axes = figure.subplots()
    layers = len(lines[0]["load_max_over_mean"])
    for layer in range(layers):
        shade = 0.35 + 0.65 * (layer + 1) / layers
        load = [line["load_max_over_mean"][layer] for line in lines]
        axes.plot(_steps(lines), load, color=TEAL, alpha=shade, lw=1, label=router_name(lines[0], layer))
    axes.axhline(1, color=SOFT, lw=1, ls=(0, (4, 3)))
    axes.set(xlabel="step", ylabel="busiest expert / mean", ylim=(0.9, None))
    if layers <= 6:
        axes.legend(loc="best", ncols=2)


@_figure(4.7, 2.9)
def speed_figure(figure: "Figure", lines: Lines) -> None:
    """Tokens per second between logged steps."""
    axes = figure.subplots()
    rates = [line["tokens_per_second"] for line in lines]
    axes.plot(_steps(lines), rates, color=TEAL, lw=1.2)
    axes.set(xlabel="step", ylabel="tokens per second", ylim=(0, max(rates) * 1.1))


def heat_map_figure(lines: Lines) -> str:
    """Load of every expert over the steps, one map per MoE layer (the MTP modules' last): 1 is the mean."""
    layers = len(lines[0]["expert_counts"])
    shown = sorted(
        {round(i * (layers - 1) / max(1, min(layers, MAX_LAYERS) - 1)) for i in range(min(layers, MAX_LAYERS))}
    )
    rows = math.ceil(len(shown) / 2)
    return _figure(9.6, 0.5 + 1.65 * rows)(_draw_heat_maps)(lines, shown, rows)


def _draw_heat_maps(figure: "Figure", lines: Lines, shown: Sequence[int], rows: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    panels = figure.subplots(rows, min(2, len(shown)), squeeze=False, sharex=True).flatten()
    scale = ScalarMappable(LogNorm(0.25, 4), "RdBu_r")
    for panel, layer in zip(panels, shown, strict=False):
        load = _load(lines, layer)
        panel.imshow(
            load, aspect="auto", origin="lower", interpolation="nearest", cmap=scale.cmap, norm=scale.norm,
            extent=(lines[0]["step"], lines[-1]["step"] + 1e-6, -0.5, len(load) - 0.5),
        )  # fmt: skip
        panel.set_title(router_name(lines[0], layer), loc="left", fontsize=8.5, color=INK)
        panel.grid(False)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    figure.supxlabel("step", fontsize=9, color=INK)
    for panel in panels[:: min(2, len(shown))]:
        panel.set_ylabel("expert")
    bar = figure.colorbar(scale, ax=list(panels), ticks=[0.25, 0.5, 1, 2, 4], format="%g×", shrink=0.9, aspect=30)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def router_name(line: dict[str, Any], router: int) -> str:
    """Name of the router at this place in `expert_counts`: MoE layers bottom to top, then the MTP modules."""
    layers = len(line["expert_counts"]) - len(line["mtp_loss"])
    return f"MoE layer {router + 1}" if router < layers else f"MTP module {router - layers + 1}"


def _load(lines: Lines, layer: int) -> list[list[float]]:
    """Expert → tokens over the mean at each line."""
    by_step = [line["expert_counts"][layer] for line in lines]
    means = [sum(counts) / len(counts) for counts in by_step]
    experts = range(len(by_step[0]))
    return [[max(c[e] / m, 0.01) for c, m in zip(by_step, means, strict=True)] for e in experts]


def _steps(lines: Lines) -> list[int]:
    return [line["step"] for line in lines]


def _style() -> dict[str, Any]:
    return {
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#c4ced3",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6ebee",
        "grid.linewidth": 0.8,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "svg.hashsalt": "nautile",
    }
