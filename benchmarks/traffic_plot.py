"""A drawing of what ``traffic`` measured, from metrics alone."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.grouped_bars import Panel, plot_bars
from benchmarks.metrics import Metric
from moe_bitnet.errors import DataError

_METRIC = "traffic.bytes_per_token"
_SERIES = ("wire", "meter", "formula")


def plot_traffic(metrics: Sequence[Metric], path: Path) -> None:
    """Draw bytes a token by mode, by tokens a step and by placement.

    Args:
        metrics: those of other names are left out.
        path: the drawing's file; its ending chooses the format.
    Raises:
        DataError: no metric says how many bytes a token took.
    """
    runs = [metric for metric in metrics if metric.metric == _METRIC]
    if not runs:
        raise DataError(f"{path}: none of {len(metrics)} metrics is {_METRIC}. Give others.")
    first = runs[0].detail
    modes = list(dict.fromkeys(str(metric.detail["mode"]) for metric in runs))
    same = [run for run in runs if _shape(run) == _shape(runs[0]) and run.detail.get("packets") == first.get("packets")]
    sizes = sorted({int(run.detail["tokens_per_step"]) for run in same})
    middle = [run for run in same if run.detail["tokens_per_step"] == (256 if 256 in sizes else sizes[-1])]
    last = [run for run in runs if run.detail["placement"] == runs[-1].detail["placement"] or _is_clustered(run)]
    series = [name for name in _SERIES if first.get(name) is not None]
    panels = [
        Panel(
            f"{first['devices']} devices, {middle[0].detail['tokens_per_step']} tokens a step",
            [str(run.detail["mode"]) for run in middle],
            {name: [float(run.detail[name]) for run in middle] for name in series},
        ),
        Panel(
            "by tokens a step",
            modes,
            {str(size): [_value(same, mode=mode, tokens_per_step=size) for mode in modes] for size in sizes},
        ),
        Panel(
            f"placements, {last[0].detail['devices']} devices, {last[0].detail['mode']}",
            [str(run.detail["placement"]).partition(",")[0] for run in last],
            {"": [float(run.value or 0.0) for run in last]},
        ),
    ]
    shape = f"rows of {first['hidden_size']}, {first['experts']} experts, {first['k']} a token"
    plot_bars(panels, path, f"Bytes between devices, a token and a layer: {shape}", "bytes a token", runs[0])


def _shape(run: Metric) -> tuple[object, ...]:
    return tuple(run.detail[name] for name in ("devices", "k", "placement"))


def _is_clustered(run: Metric) -> bool:
    return "clustered" in str(run.detail["placement"])


def _value(runs: Sequence[Metric], **wanted: object) -> float:
    [found] = [run for run in runs if all(run.detail[name] == value for name, value in wanted.items())]
    return float(found.value or 0.0)
