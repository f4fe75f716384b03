"""The table that ``moe-bitnet place`` prints of plans: a row for each format and way of counting."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from cluster.placement.report import PlacementReport
from moe_bitnet.cli.planning.device_plan import DevicePlan
from moe_bitnet.cli.planning.model_source import ModelSource
from moe_bitnet.units import format_bytes

_WIDTH = 100  # of what is no terminal

_COLUMNS: dict[str, Callable[[DevicePlan, PlacementReport | None], str]] = {
    "weights": lambda plan, _: plan.model.weights,
    "experts": lambda plan, _: format_bytes(plan.model.all_expert_bytes),
    "shared": lambda plan, _: _bytes(plan.model.shared_bytes),
    "KV cache": lambda plan, _: _bytes(plan.model.kv_bytes),
    "devices": lambda plan, _: _devices(plan),
    "bound": lambda plan, _: str(plan.lower_bound),
    "traffic": lambda _, report: format_bytes(report.uniform_bytes_per_token) if report else "",
    "traced": lambda _, report: "" if report is None else _traced(report.bytes_per_token),
    "load": lambda _, report: f"{report.imbalance:.2f}" if report and report.imbalance else "",
}


def print_plans(title: str, caption: str, plans: Sequence[tuple[DevicePlan, PlacementReport | None]]) -> None:
    """Write plans, each with its report, to stdout; columns without an entry are left out."""
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=None)
    table.caption, table.caption_justify = caption, "left"
    table.add_column("counted", no_wrap=True)
    columns = {header: [cell(plan, report) for plan, report in plans] for header, cell in _COLUMNS.items()}
    used = {header: cells for header, cells in columns.items() if any(cells)}
    for header in used:
        table.add_column(header, justify="right", no_wrap=True)
    for row, (plan, _) in enumerate(plans):
        table.add_row(plan.model.counted, *(cells[row] for cells in used.values()))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(table)


def describe_model(source: ModelSource, devices: str) -> str:
    """Return the title of a model's plans on some devices."""
    shape = source.shape
    layers = f"{shape.num_expert_layers} layers of {shape.num_experts} experts, top-{shape.top_k}"
    return f"{source.name}: {layers}, {_count(shape.num_weights)} weights, on {devices}"


def _devices(plan: DevicePlan) -> str:
    if plan.num_devices is None:
        return "no fit"
    return str(plan.num_devices) if plan.placement is not None else f"{plan.num_devices} > {plan.num_allowed}"


def _traced(num_bytes: float | None) -> str:
    return "" if num_bytes is None else format_bytes(num_bytes)


def _bytes(num_bytes: int) -> str:
    return format_bytes(num_bytes) if num_bytes else ""


def _count(number: int) -> str:
    for factor, letter in ((1e9, "B"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.4g}{letter}"
    return str(number)
