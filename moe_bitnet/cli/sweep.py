"""``moe-bitnet sweep``: a small grid of training runs, and what each precision reaches for its bytes.

Cells run as Ray tasks, one CPU each unless told otherwise. Run it again to go on after an
interruption: finished cells are used as they are, begun ones resume from their checkpoints.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from cluster.config import ClusterConfig
from cluster.training.sweep import CellResult, SweepCell
from moe_bitnet.checkpoint.stored_bytes import stored_forms
from moe_bitnet.cli import arguments
from moe_bitnet.cli.console import say
from moe_bitnet.cli.reporting.figures import save_png
from moe_bitnet.cli.reporting.sweep_plot import SweepPoint, sweep_png
from moe_bitnet.cli.reporting.units import DASH, format_bytes, format_number
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.cli.sweep_grid import Grid, read_grid
from moe_bitnet.config import Precision
from moe_bitnet.files import write_text_atomically

HELP = "train a grid of sizes and precisions; table, results.jsonl and a plot of loss against bytes"

RESULTS_NAME = "results.jsonl"
PLOT_NAME = "loss_against_bytes.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "config_file", type=Path, nargs="?", metavar="CONFIG", help="TOML file with [sweep], [sizes.NAME] and [train]"
    )
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="presets, or sizes of the file (default: tiny demo)")
    parser.add_argument("--precisions", nargs="+", choices=get_args(Precision), help="default: all")
    parser.add_argument(
        "--learning-rates", nargs="+", type=float, metavar="RATE", help="peaks (default: the known best)"
    )
    parser.add_argument("--seeds", nargs="+", type=arguments.seed, metavar="SEED", help="default: 0")
    parser.add_argument("--steps", type=int, help="optimizer steps of every cell (default: the preset's)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="takes a folder a cell (default: <run>/sweep)")
    parser.add_argument("--cpus-per-cell", type=int, default=1, metavar="N", help="CPUs and threads (default: 1)")
    parser.add_argument("--address", help="host:port of a running Ray cluster (default: start Ray here)")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train what is not finished; returns the rows of ``results.jsonl``, and prints them as a table."""
    grid = read_grid(
        args.config_file,
        sizes=args.sizes,
        precisions=args.precisions,
        learning_rates=args.learning_rates,
        seeds=args.seeds,
    )
    changes = {"num_steps": args.steps, "is_compiled": False if args.no_compile else None}
    given = {name: value for name, value in changes.items() if value is not None}
    run_folder = RunFolder(args.run)
    out = args.out or run_folder.path / "sweep"
    rows = sweep_run(grid, given, run_folder, out, ClusterConfig(address=args.address), args.cpus_per_cell)
    if not args.json:
        print_table(rows, Console())
    return {"results": str(out / RESULTS_NAME), "plot": str(out / PLOT_NAME), "cells": rows}


def sweep_run(
    grid: Grid,
    changes: dict[str, Any],
    run_folder: RunFolder,
    out: Path,
    cluster_config: ClusterConfig,
    cpus_per_cell: int = 1,
) -> list[dict[str, Any]]:
    """Run a sweep on the data of a run folder; ``changes`` are training settings that override the grid's.

    Returns:
        the rows of ``results.jsonl``, in the order of the grid.
    """
    from cluster.training.ray_sweep import run_sweep  # imports Ray

    vocab_size = run_folder.load_tokenizer().vocab_size
    grid = dataclasses.replace(grid, train={**(grid.train or {}), **changes})
    cells = grid.cells(run_folder.data.resolve(), vocab_size, out.resolve(), cpus_per_cell)
    results: dict[str, CellResult] = {}

    def tell(cell: SweepCell, result: CellResult) -> None:
        results[cell.name] = result
        _write(out, [(each, results[each.name]) for each in cells if each.name in results])
        say(f"[{len(results)}/{len(cells)}] {cell.name}: {_describe(result)}")

    say(f"{len(cells)} cells in {out}")
    run_sweep(cells, cluster_config, cpus_per_cell, tell)
    return [row_of(cell, results[cell.name]) for cell in cells]


def row_of(cell: SweepCell, result: CellResult) -> dict[str, Any]:
    """Return a cell's line of ``results.jsonl``; numbers of a cell without a summary are ``None``."""
    summary = result.summary or {}
    numbers = (
        "validation_loss",
        "validation_ppl",
        "num_parameters",
        "num_active_parameters",
        "tokens_per_s",
        "train_s",
    )
    return {
        "cell": cell.name,
        "size": cell.size,
        "precision": cell.model_config.precision,
        "peak_learning_rate": cell.train_config.peak_learning_rate,
        "seed": cell.train_config.seed,
        "num_steps": cell.train_config.num_steps,
        **{name: summary.get(name) for name in numbers},
        "bytes": stored_forms(cell.model_config),
        "error": result.error,
    }


def print_table(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print one line a cell: validation loss, and the bytes of the smallest form that it can be stored in."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("size", "precision"):
        table.add_column(name, no_wrap=True)
    for name in ("peak rate", "seed", "loss", "PPL", "bytes", "stored as"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        form, num_bytes = min(row["bytes"].items(), key=lambda each: each[1])
        loss = format_number(row["validation_loss"]) if not row["error"] else "failed"
        ppl = format_number(row["validation_ppl"], 2) if row["validation_ppl"] is not None else DASH
        table.add_row(
            row["size"], row["precision"], f"{row['peak_learning_rate']:g}", str(row["seed"]), loss, ppl,
            format_bytes(num_bytes), form,
        )  # fmt: skip
    console.print(table)


def _write(out: Path, results: Sequence[tuple[SweepCell, CellResult]]) -> None:
    """Write results.jsonl and the plot of what is finished by now."""
    rows = [row_of(cell, result) for cell, result in results]
    write_text_atomically(out / RESULTS_NAME, "".join(json.dumps(row) + "\n" for row in rows))
    points = [
        SweepPoint(form, row["size"], row["peak_learning_rate"], num_bytes, row["validation_loss"])
        for row in rows
        if row["validation_loss"] is not None
        for form, num_bytes in row["bytes"].items()
    ]
    if points:
        save_png(sweep_png(points), out / PLOT_NAME)


def _describe(result: CellResult) -> str:
    if result.summary is None:
        return result.error or "stopped, with a checkpoint"
    return f"validation loss {result.summary['validation_loss']:.3f}, PPL {result.summary['validation_ppl']:.2f}"
