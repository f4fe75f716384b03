"""A drawing of measured ratios against their goals, from metrics alone."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.metrics import Metric
from benchmarks.plot_style import INK, MUTED, save_figure, style_bars
from benchmarks.table import detail_text, goal_text
from moe_bitnet.errors import DataError

# Blue and vermilion stay apart under the common forms of colour blindness.
_REACHED, _MISSED, _NO_GOAL = "#2b6ca8", "#d0561a", "#9aa3ad"
_BAR_HEIGHT = 0.46
_MAX_DETAIL = 70


def plot_shares(metrics: Sequence[Metric], path: Path, title: str = "") -> None:
    """Draw every measured ratio as a bar, and its goal as a line across the bar.

    Args:
        metrics: those of other units, or without a value, are left out.
        path: the drawing's file; its ending chooses the format, such as ``.png`` or ``.svg``.
        title: above the drawing; by default the benchmark's name.
    Raises:
        DataError: no metric is a ratio with a value.
    """
    shares = [metric for metric in metrics if metric.unit == "ratio" and metric.value is not None]
    if not shares:
        raise DataError(f"{path}: none of {len(metrics)} metrics is a ratio with a value. Give others.")
    figure = Figure(figsize=(8.0, 1.0 + 0.62 * len(shares)), layout=ConstrainedLayoutEngine(h_pad=0.1))
    axes = figure.add_subplot()
    for row, metric in enumerate(shares):
        _draw_bar(axes, row, metric)
    _style(axes, shares)
    first = shares[0]
    axes.set_title(title or first.metric.partition(".")[0], loc="left", color=INK, fontweight="bold", pad=14)
    save_figure(figure, path, first, "the line across a bar is its goal")


def _draw_bar(axes: Axes, row: int, metric: Metric) -> None:
    assert metric.value is not None
    color = {True: _REACHED, False: _MISSED, None: _NO_GOAL}[metric.reaches_goal]
    axes.barh(row, metric.value, height=_BAR_HEIGHT, color=color)
    end = metric.value
    if metric.goal is not None:
        edges = [row - _BAR_HEIGHT * 0.72, row + _BAR_HEIGHT * 0.72]
        axes.plot([metric.goal, metric.goal], edges, color=INK, linewidth=2.0, solid_capstyle="butt")
        # Beside the line, if the number would lie upon it.
        end = max(end, metric.goal) if metric.goal > 0.8 * end else end
    number = axes.annotate(
        f"{metric.value:.3g}", (end, row), xytext=(6, 0), textcoords="offset points", va="center", color=INK,
        fontweight="bold",
    )  # fmt: skip
    axes.annotate(
        goal_text(metric), (1, 0.5), xycoords=number, xytext=(6, 0), textcoords="offset points", va="center",
        color=MUTED, fontsize="small",
    )  # fmt: skip
    detail = detail_text({key: value for key, value in metric.detail.items() if key != "is_quick"})
    label = metric.metric.partition(".")[2].replace("_", " ") + (f"  ({detail})" if detail else "")
    axes.annotate(
        label if len(label) <= _MAX_DETAIL else label[: _MAX_DETAIL - 1] + "…", (0, row - _BAR_HEIGHT * 0.72),
        xytext=(2, 1), textcoords="offset points", va="bottom", color=MUTED, fontsize="small", parse_math=False,
    )  # fmt: skip


def _style(axes: Axes, shares: Sequence[Metric]) -> None:
    longest = max(max(metric.value or 0.0, metric.goal or 0.0) for metric in shares)
    axes.set_xlim(0.0, 1.2 * longest if longest > 0 else 1.0)
    axes.set_ylim(len(shares) - 0.5, -0.9)
    axes.set_yticks([])
    style_bars(axes)
