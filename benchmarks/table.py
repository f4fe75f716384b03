"""The terminal's view of metrics: value, goal, baseline, disturbance, detail."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.metrics import AT_LEAST, AT_MOST, Metric

DISTURBANCE = "other_cpu_share"
"""Key of ``detail``, at any depth: the share of all cores that other processes used during the figure."""

_SHOWN_ELSEWHERE = {AT_LEAST, AT_MOST, DISTURBANCE}


def metrics_table(metrics: Sequence[Metric], title: str = "") -> Table:
    """Return a table with one row a metric, in the given order."""
    table = Table(title=title or None, title_justify="left", header_style="bold", pad_edge=False, box=None)
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("goal", justify="right", no_wrap=True)
    table.add_column("baseline", overflow="fold")
    table.add_column("others", justify="right", no_wrap=True)
    table.add_column("detail", overflow="fold", style="dim")
    for metric in metrics:
        table.add_row(
            Text(metric.metric),
            Text(format_value(metric.value, metric.unit), style="bold"),
            _goal_cell(metric),
            Text(_baseline_text(metric)),
            Text(_disturbance_text(metric.detail)),
            Text(detail_text(metric.detail)),
        )
    if any(_disturbance_text(metric.detail) for metric in metrics):
        table.caption = "others: CPU that other processes used meanwhile, as a share of all cores"
        table.caption_justify = "left"
    return table


def format_value(value: float | None, unit: str) -> str:
    """Write a number with four significant digits and its unit; a ratio has none."""
    if value is None:
        return "-"
    number = f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return number if unit == "ratio" else f"{number} {unit}"


def goal_text(metric: Metric) -> str:
    """Write the goal with its direction, such as ``≥ 0.85``; empty without one."""
    if metric.goal is None:
        return ""
    return f"{'≥' if AT_LEAST in metric.detail else '≤'} {metric.goal:.4g}"


def detail_text(detail: Mapping[str, Any]) -> str:
    """Write the plain entries of ``detail``; nested ones (spreads) stay in the JSON line."""
    entries = []
    for name, value in detail.items():
        if name in _SHOWN_ELSEWHERE or isinstance(value, Mapping):
            continue
        if isinstance(value, bool):
            entries.append(name.removeprefix("is_") if value else "")
        elif isinstance(value, (list, tuple)):
            entries.append(f"{name} {'×'.join(str(item) for item in value)}")
        else:
            entries.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(entry for entry in entries if entry)


def _goal_cell(metric: Metric) -> Text:
    mark, style = {True: (" ✓", "green"), False: (" ✗", "red"), None: ("", "")}[metric.reaches_goal]
    return Text(goal_text(metric) + mark, style=style)


def _baseline_text(metric: Metric) -> str:
    if metric.baseline is None:
        return ""
    return metric.baseline if metric.baseline_value is None else f"{metric.baseline}: {metric.baseline_value:.4g}"


def _disturbance_text(detail: Mapping[str, Any]) -> str:
    shares = list(_disturbances(detail))
    return f"{max(shares):.0%}" if shares else ""


def _disturbances(detail: Mapping[str, Any]) -> Iterable[float]:
    for name, value in detail.items():
        if isinstance(value, Mapping):
            yield from _disturbances(value)
        elif name == DISTURBANCE and value is not None:
            yield float(value)
