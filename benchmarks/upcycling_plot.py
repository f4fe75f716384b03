"""A drawing of upcycled models' perplexity against the tokens that they were trained on, from metrics alone."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.metrics import Metric
from benchmarks.plot_style import INK, MUTED, save_figure, style_axes
from moe_bitnet.errors import DataError

_TRAINED = {"mote": "#2b6ca8", "ternary": "#d0561a", "dense_trained": "#3d8b53"}
_UNTRAINED = {"dense": "#1d2430", "rounded": "#9aa3ad"}
_NEAR_DENSE = ("dense", "dense_trained", "mote")
_LABELS = {
    "mote": "ternary experts beside the float model",
    "ternary": "all ternary",
    "dense": "dense model",
    "dense_trained": "dense model, trained on",
    "rounded": "dense model rounded to ternary",
}


def plot_upcycling(metrics: Sequence[Metric], path: Path) -> None:
    """Draw a column a kind of text: all models above, and below the float model with new experts near the dense one.

    Args:
        metrics: those that are no perplexities are left out.
        path: the drawing's file; its ending chooses the format.
    Raises:
        DataError: there are no perplexities.
    """
    points = [metric for metric in metrics if metric.metric.endswith(".ppl") and metric.value is not None]
    if not points:
        raise DataError(f"{path}: none of {len(metrics)} metrics is a perplexity. Give others.")
    texts = list(dict.fromkeys(str(point.detail["text"]) for point in points))
    figure = Figure(figsize=(5.2 * len(texts), 7.6), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    all_models, near_dense = figure.subplots(2, len(texts), squeeze=False)
    for column, text in enumerate(texts):
        of_text = [point for point in points if point.detail["text"] == text]
        _draw(all_models[column], of_text)
        _draw(near_dense[column], [point for point in of_text if point.detail["model"] in _NEAR_DENSE])
        all_models[column].set_yscale("log")
        all_models[column].set_title(f"PPL on {text}", loc="left", color=INK, fontweight="bold", fontsize="medium")
        near_dense[column].set_title("the same, near the dense model", loc="left", color=INK, fontsize="medium")
    save_figure(figure, path, points[0], str(points[0].detail["source"]))


def _draw(axes: Axes, points: Sequence[Metric]) -> None:
    for model, color in _UNTRAINED.items():
        for point in points:
            if point.detail["model"] == model:
                label = f"{_LABELS[model]}, {point.value or 0.0:.3g}"
                axes.axhline(point.value or 0.0, color=color, linewidth=1.2, linestyle="--", label=label)
    for model, color in _TRAINED.items():
        line = sorted(
            (point.detail["tokens"], point.value or 0.0) for point in points if point.detail["model"] == model
        )
        if line:
            label = f"{_LABELS[model]}, {line[-1][1]:.3g} at the end"
            axes.plot(*zip(*line, strict=True), "o-", color=color, linewidth=1.8, markersize=4, label=label)
    axes.margins(y=0.3)  # room for the legend
    axes.set_xlabel("tokens of continued training", color=MUTED)
    style_axes(axes)
    axes.legend(edgecolor="none", framealpha=0.9, fontsize="small", labelcolor=MUTED, loc="upper right")
