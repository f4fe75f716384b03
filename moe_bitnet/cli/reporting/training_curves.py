"""The curves of one training run, each on axes of the caller: loss, schedule, speed, gradient, experts, traffic."""

import math
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moe_bitnet.cli.reporting.figures import Drawing
from moe_bitnet.cli.reporting.plots import (
    LOAD_COLORS,
    Palette,
    columns,
    label_cells,
    mean_over_neighbours,
    note_above,
    style_axes,
)
from moe_bitnet.cli.reporting.sections import TrainingSection

_MAX_TIME_CELLS = 120
# Loads of 0 to 2 times the even share fill the colours; beyond, they stay at the end.
_LOAD_RANGE = (0.0, 2.0)


def training_drawings(section: TrainingSection) -> list[Drawing]:
    """Return the curves that a run has numbers for; the first is the loss."""
    points = section.points
    drawings = [Drawing("loss", "Loss", partial(draw_loss, section))]
    if points:
        rates = [(point.step, point.learning_rate) for point in points]
        speeds = mean_over_neighbours([(point.step, point.tokens_per_s) for point in points])
        drawings += [
            Drawing("rate", "Learning rate", partial(draw_line, rates, "of projections and experts")),
            Drawing("speed", "Tokens a second", partial(draw_line, speeds, "over all workers, smoothed")),
        ]
    norms = [(point.step, point.gradient_norm) for point in points if math.isfinite(point.gradient_norm)]
    if norms:
        note = "norm before clipping, smoothed"
        drawings.append(Drawing("gradient", "Gradient", partial(draw_line, mean_over_neighbours(norms), note)))
    if any(point.expert_load_max for point in points):
        drawings.append(Drawing("busiest", "Busiest expert of each layer", partial(draw_loads, section)))
    traffic = [(point.step, point.dispatch_bytes / 1e6) for point in points]
    if any(megabytes > 0 for _, megabytes in traffic):
        note = "MB a step between workers, both passes"
        drawings.append(Drawing("dispatch", "Dispatch", partial(draw_line, traffic, note)))
    return drawings


def draw_loss(section: TrainingSection, axes: Axes, palette: Palette) -> None:
    """Draw the training loss, smoothed, and the validation loss against steps."""
    losses = mean_over_neighbours([(point.step, point.loss) for point in section.points])
    validation = [(point.step, point.validation_loss) for point in section.evaluations]
    axes.plot(*columns(losses), color=palette.ternary, linewidth=1.3, label="training, smoothed")
    axes.plot(*columns(validation), color=palette.twin, linewidth=1.8, marker="o", markersize=3.6, label="validation")
    _style_steps(axes, palette, "nats a token")
    if losses or validation:
        axes.legend(frameon=False, labelcolor=palette.ink, loc="upper right")


def draw_line(pairs: list[tuple[int, float]], note: str, axes: Axes, palette: Palette) -> None:
    """Draw one number against steps."""
    axes.plot(*columns(pairs), color=palette.ternary, linewidth=1.3)
    axes.set_ylim(bottom=0.0)
    _style_steps(axes, palette, note)


def draw_loads(section: TrainingSection, axes: Axes, palette: Palette) -> None:
    """Draw the load of each layer's busiest expert over time, one row a layer; averages over stretches of steps."""
    points = [point for point in section.points if point.expert_load_max]
    num_layers = len(points[-1].expert_load_max)
    points = [point for point in points if len(point.expert_load_max) == num_layers]
    stretches = np.array_split(np.arange(len(points)), min(_MAX_TIME_CELLS, len(points)))
    loads = np.array([point.expert_load_max for point in points])  # [steps, L]
    means = np.stack([loads[stretch].mean(axis=0) for stretch in stretches], axis=1)
    edges = [points[stretch[0]].step - 0.5 for stretch in stretches] + [points[-1].step + 0.5]
    low, high = _LOAD_RANGE
    mesh = axes.pcolormesh(edges, np.arange(num_layers + 1), means, cmap=LOAD_COLORS, vmin=low, vmax=high)
    mesh.set_rasterized(True)
    axes.invert_yaxis()
    note = f"times the even share: pale 1, orange {high:g} and more"
    _style_steps(axes, palette, note)
    axes.grid(visible=False)
    label_cells(axes.yaxis, num_layers)
    axes.set_ylabel("layer", color=palette.muted, fontsize="small")


def _style_steps(axes: Axes, palette: Palette, note: str) -> None:
    style_axes(axes, palette)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.set_xlabel("training step", color=palette.muted, fontsize="small")
    note_above(axes, note, palette)
