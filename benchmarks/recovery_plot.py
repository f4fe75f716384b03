"""A drawing of the time between tokens while a host is lost, a line a kind of loss, from metrics alone."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.metrics import Metric
from benchmarks.plot_style import INK, MUTED, save_figure, style_axes
from moe_bitnet.errors import DataError

_COLORS = ("#2b6ca8", "#d0561a", "#7b858f")


def plot_recovery(metrics: Sequence[Metric], path: Path) -> None:
    """Draw the run with the longest pause of every kind of loss.

    Args:
        metrics: those without times between tokens are left out.
        path: the drawing's file; its ending chooses the format.
    Raises:
        DataError: no metric has such times.
    """
    runs = [metric for metric in metrics if "pauses" in metric.detail]
    if not runs:
        raise DataError(f"{path}: none of {len(metrics)} metrics has times between tokens. Give others.")
    figure = Figure(figsize=(8.0, 3.8), layout=ConstrainedLayoutEngine(h_pad=0.08))
    axes = figure.add_subplot()
    for run, color in zip(runs, _COLORS, strict=False):
        times_ms = run.detail["pauses"]["ms_between_tokens"][1:]  # the first is the prompt's
        label = f"{run.detail['fault']}: at most {run.value or 0.0:.2g} s"
        axes.plot(range(1, 1 + len(times_ms)), times_ms, color=color, linewidth=1.4, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("token", color=MUTED)
    axes.set_ylabel("ms since the token before", color=MUTED)
    axes.set_title("A host is lost while the model writes", loc="left", color=INK, fontweight="bold")
    style_axes(axes, "y")
    axes.legend(frameon=False, fontsize="small", labelcolor=MUTED)
    save_figure(figure, path, runs[0])
