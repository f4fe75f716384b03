"""A drawing of figures beside each other: panels of bars, one or several for each label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from benchmarks.metrics import Metric
from benchmarks.plot_style import INK, MUTED, save_figure, style_bars
from moe_bitnet.errors import DataError

# Blue, orange and greys that differ in lightness as well.
_COLORS = ("#2b6ca8", "#e08a4f", "#9aa3ad", "#4b545e")
_GROUP_HEIGHT, _LARGEST_HEIGHT = 0.74, 0.4


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        title: above it.
        labels: one for each group of bars, from the top.
        values: name of a series (for the legend) → its value for each label.
        upper_ends: for each label, where a thin line from the first bar ends; without it there is none.
    """

    title: str
    labels: Sequence[str]
    values: Mapping[str, Sequence[float]]
    upper_ends: Sequence[float] | None = None


def plot_bars(
    panels: Sequence[Panel],
    path: Path,
    title: str,
    unit: str,
    source: Metric,
    *,
    is_logarithmic: bool = False,
) -> None:
    """Draw panels beside each other.

    Args:
        panels: at least one, none of them empty.
        path: the drawing's file; its ending chooses the format.
        title: above the drawing.
        unit: below every panel.
        source: a metric of the run; gives machine and commit.
        is_logarithmic: for values that differ by orders of magnitude, all above 0.
    Raises:
        DataError: there is nothing to draw.
    """
    if not panels or not all(panel.labels and panel.values for panel in panels):
        raise DataError(f"{path}: nothing to draw. Give at least one panel, each with a label and a series.")
    most = max(len(panel.labels) * (1 + len(panel.values)) for panel in panels)
    size = (2.2 + 3.4 * len(panels), 1.6 + 0.24 * most)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel, is_logarithmic)
        axes.set_xlabel(unit, color=MUTED, fontsize="small")
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontweight="bold")
    save_figure(figure, path, source)


def _draw_panel(axes: Axes, panel: Panel, is_logarithmic: bool) -> None:
    height = min(_GROUP_HEIGHT / len(panel.values), _LARGEST_HEIGHT)
    for index, (name, values) in enumerate(panel.values.items()):
        shift = (index - (len(panel.values) - 1) / 2) * height
        rows = [row + shift for row in range(len(values))]
        axes.barh(rows, values, height=0.9 * height, color=_COLORS[index % len(_COLORS)], label=name)
        for position, (row, value) in enumerate(zip(rows, values, strict=True)):
            end = value if panel.upper_ends is None or index else max(value, panel.upper_ends[position])
            axes.plot([value, end], [row, row], color=INK, linewidth=1.0)
            axes.annotate(
                _number(value), (end, row), xytext=(4, 0), textcoords="offset points", va="center", color=INK,
                fontsize="small",
            )  # fmt: skip
    axes.set_yticks(range(len(panel.labels)), panel.labels)
    axes.set_ylim(len(panel.labels) - 0.5, -0.5)
    largest = max(max(values) for values in panel.values.values())
    largest = max(largest, *(panel.upper_ends or [0.0]))
    if is_logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(None, 5 * largest)
    else:
        axes.set_xlim(0, 1.3 * largest if largest else 1)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_title(panel.title, loc="left", color=INK, fontsize="medium")
    style_bars(axes)
    if len(panel.values) > 1:
        axes.legend(frameon=False, fontsize="small", labelcolor=MUTED)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
