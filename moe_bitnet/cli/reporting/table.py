"""Print the comparison of a run in the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_bitnet.cli.reporting.sections import Results
from moe_bitnet.cli.reporting.summary import to_report


def print_report(report: dict[str, Any] | Results, console: Console) -> None:
    """Print one table (what, FP16 twin, ternary, ratio) and the steps that were not run.

    Args:
        report: what :func:`write_report` or :func:`to_report` returned, or results themselves.
        console: where to print.
    """
    if isinstance(report, Results):
        report = to_report(report)
    if report["comparison"]:
        console.print(comparison_table(report))
    else:
        console.print(Text(f"{report['run']}: nothing to compare yet."))
    for entry in report["missing"]:
        console.print(Text.assemble((f"not complete: {entry['title']}", "yellow"), "  →  ", (entry["command"], "bold")))


def comparison_table(report: dict[str, Any]) -> Table:
    """Build the table; texts of the run are printed as they are, never read as markup."""
    table = Table(title=Text(f"Demo {report['run']}"), title_justify="left", header_style="bold")
    table.add_column("what")
    for name in ("FP16 twin", "ternary", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    group = report["comparison"][0]["group"]
    for row in report["comparison"]:
        if row["group"] != group:
            table.add_section()
            group = row["group"]
        table.add_row(Text(row["what"]), Text(row["twin"]), Text(row["ternary"]), Text(row["ratio"], style="bold"))
    return table
