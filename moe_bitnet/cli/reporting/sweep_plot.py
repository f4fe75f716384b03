"""Validation loss against bytes: one line a stored form, one point a size, each at its best learning rate."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from moe_bitnet.cli.reporting.figures import Drawing, drawings_png
from moe_bitnet.cli.reporting.plots import Palette, note_above, style_axes
from moe_bitnet.cli.reporting.units import format_bytes

_MARKERS = "osD^vP"


@dataclass(frozen=True)
class SweepPoint:
    """One finished cell in one form that it can be stored in.

    Attributes:
        form: such as ``"ternary base3"``.
        size: name of the shape.
        peak_learning_rate: of the cell.
        num_bytes: of the stored model.
        loss: validation loss, nats a token.
    """

    form: str
    size: str
    peak_learning_rate: float
    num_bytes: int
    loss: float


def best_points(points: Sequence[SweepPoint]) -> dict[str, list[tuple[int, float]]]:
    """Return bytes and loss of each form's sizes, rising in bytes: the mean over seeds at the best learning rate."""
    losses: dict[tuple[str, str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        losses[point.form, point.size, point.num_bytes][point.peak_learning_rate].append(point.loss)
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for (form, _, num_bytes), by_rate in losses.items():
        lines[form].append((num_bytes, min(fmean(values) for values in by_rate.values())))
    return {form: sorted(line) for form, line in lines.items()}


def sweep_png(points: Sequence[SweepPoint]) -> bytes:
    """Render the picture, 1600 × 900 pixels."""

    def draw(axes: Axes, palette: Palette) -> None:
        draw_loss_against_bytes(points, axes, palette)

    return drawings_png("Quality for its size", [Drawing("sweep", "Validation loss against bytes", draw)])


def draw_loss_against_bytes(points: Sequence[SweepPoint], axes: Axes, palette: Palette) -> None:
    """Draw the lines of :func:`best_points` on a logarithmic axis of bytes."""
    colors = {"FP16": palette.twin, "ternary base3": palette.ternary, "ternary 2bit": palette.ternary_light}
    style_axes(axes, palette)
    axes.set_xscale("log")
    for index, (form, line) in enumerate(best_points(points).items()):
        color, marker = colors.get(form, (palette.ink, palette.muted)[index % 2]), _MARKERS[index % len(_MARKERS)]
        axes.plot(*zip(*line, strict=True), label=form, color=color, marker=marker, linewidth=1.8, markersize=7)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(size)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("stored model, embedding included", color=palette.muted, fontsize="small")
    note_above(
        axes, "nats a token, mean over seeds at each precision's best learning rate; lower left is better", palette
    )
    if points:
        axes.legend(frameon=False, labelcolor=palette.ink)
