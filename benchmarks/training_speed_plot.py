"""A drawing of training speed: tokens per CPU second by precision, two workers in two ways, from metrics alone."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.metrics import Metric
from benchmarks.plot_style import INK, save_figure, style_bars
from moe_bitnet.errors import DataError

_COLOR, _OTHER = "#2b6ca8", "#9aa3ad"


def plot_training_speed(metrics: Sequence[Metric], path: Path) -> None:
    """Draw what ``training_speed`` measured.

    Args:
        metrics: those of other names are left out.
        path: the drawing's file; its ending chooses the format.
    Raises:
        DataError: there are no tokens per CPU second among the metrics.
    """
    by_name: dict[str, list[Metric]] = {}
    for metric in metrics:
        by_name.setdefault(metric.metric.rpartition(".")[2], []).append(metric)
    speeds = by_name.get("tokens_per_cpu_s", [])
    if not speeds:
        raise DataError(f"{path}: none of {len(metrics)} metrics is tokens_per_cpu_s. Give others.")
    figure = Figure(figsize=(11.0, 3.2), layout=ConstrainedLayoutEngine(w_pad=0.1))
    left, middle, right = figure.subplots(1, 3)
    _draw_bars(left, {metric.detail["precision"]: metric.value or 0.0 for metric in speeds}, "{:,.0f}")
    left.axvline(speeds[0].goal or 0.0, color=INK, linewidth=0.8, linestyle=":")
    workers = {}
    for metric in by_name.get("ep_vs_dp_step", []):
        data_s = metric.baseline_value or 0.0
        workers = {"data parallel": data_s * 1e3, "expert parallel": data_s * (metric.value or 0.0) * 1e3}
    _draw_bars(middle, workers, "{:,.0f}")
    exchanged = {}
    for metric in by_name.get("dispatch_bytes_vs_formula", []):
        exchanged = {"formula": (metric.baseline_value or 0.0) / 1e6, "meter": metric.detail["bytes_per_step"] / 1e6}
    _draw_bars(right, exchanged, "{:,.2f}")
    for axes, title in (
        (left, "Tokens per CPU second (dotted: the goal)"),
        (middle, "Two workers: ms a step"),
        (right, "Exchanged rows: MB a step"),
    ):
        axes.set_title(title, loc="left", color=INK, fontweight="bold", fontsize="medium")
    save_figure(figure, path, speeds[0], "21M parameters, 7.8M active, compiled bfloat16")


def _draw_bars(axes: Axes, values: dict[str, float], form: str) -> None:
    names = list(values)
    colors = [_COLOR if name in ("ternary", "expert parallel", "meter") else _OTHER for name in names]
    bars = axes.barh(range(len(names)), list(values.values()), color=colors, height=0.6)
    axes.bar_label(bars, [form.format(value) for value in values.values()], padding=3, color=INK, fontsize="small")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(values.values(), default=1.0))
    style_bars(axes)
