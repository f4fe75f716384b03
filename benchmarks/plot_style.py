"""How all drawings of this package look, and what stands below them: machine and commit."""

from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.metrics import Metric

INK, MUTED = "#1d2430", "#5c6670"
_GRID = "#e3e6ea"


def style_axes(
    axes: Axes, grid: Literal["both", "x", "y"] = "both", hidden: tuple[str, ...] = ("top", "right")
) -> None:
    """Mute ticks, draw a light grid behind the data, and hide spines."""
    axes.tick_params(colors=MUTED, labelsize="small", length=3)
    axes.grid(axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in hidden:
        axes.spines[side].set_visible(False)


def style_bars(axes: Axes) -> None:
    """Style axes of horizontal bars: they stand on the left spine."""
    style_axes(axes, "x", ("top", "right", "bottom"))
    axes.spines["left"].set_color(MUTED)


def source_text(metric: Metric) -> str:
    """Say on which machine and at which commit a metric was measured."""
    machine = metric.machine
    return f"{machine.get('cpu', 'unknown machine')}, {machine.get('num_cores', '?')} cores · commit {metric.commit}"


def save_figure(figure: Figure, path: Path, source: Metric, remark: str = "") -> None:
    """Write machine and commit of ``source`` below a figure, then the figure; the path's ending chooses the format."""
    text = f"{source_text(source)} · {remark}" if remark else source_text(source)
    figure.supxlabel(text, x=0.01, ha="left", color=MUTED, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
