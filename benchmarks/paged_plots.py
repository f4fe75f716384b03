"""Speed of attention by depth, from the metrics of ``paged_attention`` alone."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.metrics import Metric
from benchmarks.plot_style import source_text
from moe_bitnet.errors import DataError

# Dark to light by width; apart under the common forms of colour blindness.
_COLORS = {
    "FP16": "#1d2430",
    "K8V8": "#2b6ca8",
    "K8V4": "#4fa3a5",
    "K4V4": "#d0561a",
    "K4V2": "#e39a3b",
    "K2V2": "#8a4f9e",
}
_PANELS = (
    ("paged_attention.speedup_vs_torch", "times as fast as torch's fastest formulation"),
    ("paged_attention.share_of_bandwidth", "packed bytes, share of the read bandwidth"),
)


def plot_by_depth(metrics: Sequence[Metric], path: Path) -> None:
    """Draw one line a format over the tokens in the cache, for the speed-up and the share of the bandwidth.

    Args:
        metrics: of ``benchmarks.paged_attention``; others are left out.
        path: the drawing's file; its ending chooses the format.

    Raises:
        DataError: there is nothing to draw.
    """
    lines: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for metric in metrics:
        if metric.value is not None and "depth" in metric.detail:
            lines[metric.metric][metric.detail["format"]].append((metric.detail["depth"], metric.value))
    if not any(name in lines for name, _ in _PANELS):
        raise DataError(f"{path}: none of {len(metrics)} metrics is of attention by depth.")
    figure = Figure(figsize=(11.0, 4.4), layout=ConstrainedLayoutEngine(w_pad=0.15))
    for axes, (name, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for format_name, points in lines[name].items():
            depths, values = zip(*sorted(points), strict=True)
            axes.plot(depths, values, marker="o", markersize=4, label=format_name, color=_COLORS.get(format_name))
        axes.axhline(1.0, color="#9aa3ad", linewidth=1.0)
        axes.set_xscale("log", base=2)
        ticks = sorted({depth for points in lines[name].values() for depth, _ in points})
        axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in the cache")
        axes.set_title(label, loc="left", fontsize="medium")
        axes.grid(color="#e3e6ea", linewidth=0.8)
        axes.legend(frameon=False, fontsize="small")
    figure.suptitle(
        f"One token's attention, LLaMA-3-8B heads · {source_text(metrics[0])}",
        x=0.01,
        ha="left",
        fontsize="small",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
