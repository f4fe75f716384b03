"""A drawing of tokens against budget, a line a cache format and a panel a model, from metrics alone."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.metrics import Metric
from benchmarks.plot_style import INK, MUTED, save_figure, style_axes
from moe_bitnet.errors import DataError

# Grey for FP16; the others apart in lightness, from 8 bits to 2.
_COLORS = {
    "FP16": "#7b858f",
    "K8V8": "#8ec1e8",
    "K8V4": "#4a98d3",
    "K4V4": "#2b6ca8",
    "K4V2": "#e08a4f",
    "K2V2": "#b8430f",
}
_METRIC = "max_sequence.tokens"


def plot_capacity(metrics: Sequence[Metric], path: Path) -> None:
    """Draw what ``max_sequence`` measured.

    Args:
        metrics: those of other names are left out.
        path: the drawing's file; its ending chooses the format.
    Raises:
        DataError: no metric says how many tokens a budget held.
    """
    points = [metric for metric in metrics if metric.metric == _METRIC and metric.value is not None]
    if not points:
        raise DataError(f"{path}: none of {len(metrics)} metrics is {_METRIC}. Give others.")
    models = list(dict.fromkeys(metric.detail["model"] for metric in points))
    figure = Figure(figsize=(1.0 + 3.7 * len(models), 4.4), layout=ConstrainedLayoutEngine(w_pad=0.08))
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        _draw_model(axes, [metric for metric in points if metric.detail["model"] == model])
        axes.set_title(model, loc="left", color=INK, fontweight="bold")
    panels[0].set_ylabel("tokens held, really filled", color=MUTED)
    save_figure(figure, path, points[0], "dots: prefill through the model, rings: keys and values stored")


def _draw_model(axes: Axes, points: Sequence[Metric]) -> None:
    budgets = sorted({metric.detail["budget_mib"] for metric in points})
    for name, color in _COLORS.items():
        own = sorted((p for p in points if p.detail["format"] == name), key=lambda p: float(p.detail["budget_mib"]))
        x, y = [int(metric.detail["budget_mib"]) for metric in own], [metric.value or 0.0 for metric in own]
        axes.plot(x, y, color=color, linewidth=1.6, zorder=2)
        for metric, budget, tokens in zip(own, x, y, strict=True):
            face = color if metric.detail["fill"] == "prefill" else "white"
            axes.plot(budget, tokens, "o", color=color, markerfacecolor=face, zorder=3)
        if own:
            axes.annotate(
                f"{name}  {y[-1]:,.0f}", (x[-1], y[-1]), xytext=(8, 0), va="center",
                textcoords="offset points", color=color, fontsize="small", fontweight="bold",
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(budgets, [f"{budget} MiB" for budget in budgets])
    axes.set_xlim(budgets[0] / 1.3, budgets[-1] * (2.2 if len(budgets) == 1 else (budgets[-1] / budgets[0]) ** 0.55))
    axes.minorticks_off()
    style_axes(axes)
