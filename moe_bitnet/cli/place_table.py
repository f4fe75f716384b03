"""The table that ``moe-bitnet place`` prints of plans: a row for each format and way of counting."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from moe_bitnet.cli.planning.device_plan import DevicePlan
from moe_bitnet.units import format_bytes


def print_plans(title: str, caption: str, plans: Sequence[tuple[DevicePlan, float | None]]) -> None:
    """Write plans, each with its predicted bytes a token, to stdout."""
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=None)
    table.caption, table.caption_justify = caption, "left"
    table.add_column("counted", no_wrap=True)
    for header in ("weights", "experts", "shared", "KV cache", "devices", "bound", "traffic"):
        table.add_column(header, justify="right", no_wrap=True)
    for plan, bytes_per_token in plans:
        model = plan.model
        table.add_row(
            model.counted,
            model.weights,
            format_bytes(model.all_expert_bytes),
            format_bytes(model.shared_bytes) if model.shared_bytes else "",
            format_bytes(model.kv_bytes) if model.kv_bytes else "",
            _devices(plan),
            str(plan.lower_bound),
            "" if bytes_per_token is None else format_bytes(bytes_per_token),
        )
    Console(highlight=False).print(table)


def _devices(plan: DevicePlan) -> str:
    if plan.num_devices is None:
        return "no fit"
    return str(plan.num_devices) if plan.placement is not None else f"{plan.num_devices} > {plan.num_allowed}"
