"""``moe-bitnet report``: what the other steps left → a table, report.json and report.html.

With the folder of one training run, finished or interrupted: its curves and report.html.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_bitnet.cli.console import say
from moe_bitnet.cli.reporting import print_report, write_report, write_training_report
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.errors import DataError

HELP = "write the table, report.json and report.html from what the other steps left"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("training", type=Path, nargs="?", metavar="OUT", help="folder of one training run")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the report; prints the table unless JSON was asked for."""
    if args.training is not None:
        return report_training(args.training)
    return report_run(RunFolder(args.run), is_quiet=args.json)


def report_run(run_folder: RunFolder, is_quiet: bool = False) -> dict[str, Any]:
    """Write the report of a run, and print its table to stdout unless it should be quiet."""
    if not run_folder.path.is_dir():
        raise DataError(
            f"{run_folder.path}: there is no such run. Run 'moe-bitnet demo --run {run_folder.path}' first."
        )
    report = write_report(run_folder.path)
    if not is_quiet:
        print_report(report, Console())
    say(f"report: {run_folder.path / 'report' / 'report.html'}")
    return report


def report_training(out_folder: Path) -> dict[str, Any]:
    """Write the report of one training run, finished or not; returns its headline numbers."""
    numbers = write_training_report(out_folder)
    say(f"report: {numbers['report']}")
    return numbers
