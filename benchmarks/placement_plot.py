"""A drawing of visits and balance against the number of devices, contiguous beside learned, from metrics alone."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.metrics import Metric
from benchmarks.plot_style import INK, MUTED, save_figure, style_axes
from moe_bitnet.errors import DataError

_LEARNED, _CONTIGUOUS = "#2b6ca8", "#9aa3ad"
_PANELS = (
    ("placement.distinct_devices_vs_contiguous", "devices that a token visits in a layer"),
    ("placement.imbalance", "load of the fullest device / mean, worst layer"),
)


def plot_placement(metrics: Sequence[Metric], path: Path) -> None:
    """Draw what ``placement`` measured on clustered traces.

    Args:
        metrics: those of other names are left out.
        path: the drawing's file; its ending chooses the format.
    Raises:
        DataError: a panel has nothing to draw.
    """
    figure = Figure(figsize=(9.0, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.1))
    first = None
    for axes, (name, label) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        points = [metric for metric in metrics if metric.metric == name and metric.value is not None]
        if not points:
            raise DataError(f"{path}: none of {len(metrics)} metrics is {name}. Give others.")
        first = first or points[0]
        _draw(axes, points, is_ratio=name.endswith("_vs_contiguous"))
        axes.set_title(label, loc="left", color=INK, fontweight="bold", fontsize="medium")
    assert first is not None
    remark = "clustered trace, 128 experts, top-8; learned on one half, judged on the other"
    save_figure(figure, path, first, remark)


def _draw(axes: Axes, points: Sequence[Metric], is_ratio: bool) -> None:
    points = sorted(points, key=lambda metric: int(metric.detail["devices"]))
    devices = [int(metric.detail["devices"]) for metric in points]
    contiguous = [metric.baseline_value or 0.0 for metric in points]
    learned = [
        (metric.value or 0.0) * (base if is_ratio else 1.0) for metric, base in zip(points, contiguous, strict=True)
    ]
    for name, values, color in (("contiguous", contiguous, _CONTIGUOUS), ("learned", learned, _LEARNED)):
        axes.plot(devices, values, "o-", color=color, linewidth=1.8)
        axes.annotate(
            f"{name}  {values[-1]:.2f}", (devices[-1], values[-1]), xytext=(8, 0), va="center",
            textcoords="offset points", color=color, fontsize="small", fontweight="bold",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(devices, [str(count) for count in devices])
    axes.set_xlim(devices[0] / 1.2, devices[-1] * 2.6)
    axes.set_ylim(bottom=1.0, top=1.08 * max(*contiguous, *learned, 1.05))
    axes.set_xlabel("devices", color=MUTED)
    axes.minorticks_off()
    style_axes(axes)
