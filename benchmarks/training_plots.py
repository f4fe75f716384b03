"""Drawings of the quality table, from metrics alone: perplexity against bytes, gap by size, learning rates."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.metrics import Metric
from benchmarks.plot_style import INK, MUTED, save_figure, style_axes
from moe_bitnet.errors import DataError

_COLORS = {"ternary": "#d0561a", "float": "#2b6ca8", "int4-experts": "#5b8c3e", "binary": "#8a6fb0"}
_LABELS = {"ternary": "ternary", "float": "FP16", "int4-experts": "int4 experts", "binary": "binary (b1)"}


def plot_training_quality(metrics: Sequence[Metric], path: Path) -> None:
    """Draw three panels of what ``training_quality`` measured on code.

    Args:
        metrics: those of other names are left out.
        path: the drawing's file; its ending chooses the format.
    Raises:
        DataError: there are no perplexities among the metrics.
    """
    models = _on_code(metrics, ".validation_ppl")
    if not models:
        raise DataError(f"{path}: none of {len(metrics)} metrics is a validation_ppl. Give others.")
    figure = Figure(figsize=(13.0, 4.4), layout=ConstrainedLayoutEngine(w_pad=0.1))
    by_bytes, by_size, by_rate = figure.subplots(1, 3)
    _draw_bytes(by_bytes, models)
    _draw_gaps(by_size, metrics)
    _draw_sweeps(by_rate, _on_code(metrics, ".sweep_ppl"))
    for axes, title in (
        (by_bytes, "Validation PPL against stored bytes"),
        (by_size, "PPL over the float twin's, equal parameters"),
        (by_rate, "Sweeps of the peak learning rate"),
    ):
        axes.set_title(title, loc="left", color=INK, fontweight="bold", fontsize="medium")
        style_axes(axes)
    save_figure(figure, path, models[0], "standard library's sources; mean of seeds")


def _on_code(metrics: Sequence[Metric], ending: str) -> list[Metric]:
    return [metric for metric in metrics if metric.metric.endswith(ending) and metric.detail["corpus"] == "code"]


def _draw_bytes(axes: Axes, models: Sequence[Metric]) -> None:
    for precision, color in _COLORS.items():
        of_precision = [model for model in models if model.detail["precision"] == precision]
        points = sorted((model.detail["bytes"] / 1e6, model.value or 0.0) for model in of_precision)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=color, linewidth=1.8, label=_LABELS[precision])
        for model in of_precision:
            for loss in model.detail["losses_by_seed"]:
                axes.plot(model.detail["bytes"] / 1e6, math.exp(loss), "o", color=color, markersize=4, alpha=0.4)
    _set_log_scales(axes, axes.xaxis, axes.yaxis)
    axes.set_xlabel("MB (floats at 16 bits, ternary in base-3; small points: seeds)", color=MUTED)
    axes.legend(frameon=False, fontsize="small", labelcolor=MUTED)


def _draw_gaps(axes: Axes, metrics: Sequence[Metric]) -> None:
    active = {
        metric.detail["size"]: metric.detail["active_parameters"] / 1e6
        for metric in _on_code(metrics, ".validation_ppl")
    }
    gaps = _on_code(metrics, "ppl_vs_twin")
    if not gaps:
        return
    for precision in ("ternary", "int4-experts", "binary"):
        points = sorted((active[m.detail["size"]], m) for m in gaps if m.detail["precision"] == precision)
        color = _COLORS[precision]
        if points:
            sizes = [size for size, _ in points]
            axes.plot(sizes, [m.value for _, m in points], "-", color=color, linewidth=1.8, label=_LABELS[precision])
            for size, metric in points:
                axes.plot([size] * len(metric.detail["by_seed"]), metric.detail["by_seed"], "o", color=color, alpha=0.6)
    axes.axhline(1.0, color=MUTED, linewidth=0.8)
    axes.axhline(1.05, color=MUTED, linewidth=0.8, linestyle=":")
    _set_log_scales(axes, axes.xaxis)
    axes.set_xlabel("million active parameters (points: seeds; dotted: the goal)", color=MUTED)
    axes.legend(frameon=False, fontsize="small", labelcolor=MUTED)


def _draw_sweeps(axes: Axes, sweeps: Sequence[Metric]) -> None:
    if not sweeps:
        return
    styles = {"small": "-", "middle": "--", "large": ":"}
    for size, style in styles.items():
        for precision, color in _COLORS.items():
            points = sorted(
                (m.detail["peak_learning_rate"], m.value or 0.0)
                for m in sweeps
                if m.detail["size"] == size and m.detail["precision"] == precision
            )
            if points:
                axes.plot(*zip(*points, strict=True), style, marker="o", color=color, linewidth=1.4)
    for size, style in styles.items():
        axes.plot([], [], style, color=MUTED, label=size)
    _set_log_scales(axes, axes.yaxis)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks(sorted({m.detail["peak_learning_rate"] for m in sweeps}))
    axes.set_xlabel("peak learning rate", color=MUTED)
    axes.legend(frameon=False, fontsize="small", labelcolor=MUTED)


def _set_log_scales(axes: Axes, *scales: Axis) -> None:
    """Make scales logarithmic, with whole numbers at their ticks."""
    for scale in scales:
        (axes.set_xscale if scale is axes.xaxis else axes.set_yscale)("log")
        scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        scale.set_major_formatter(lambda value, _: f"{value:g}")
        scale.set_minor_formatter(NullFormatter())
