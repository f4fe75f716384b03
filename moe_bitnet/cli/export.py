"""``moe-bitnet export``: a checkpoint of a training run, in parts → one model, as it was trained or packed."""

import argparse
from pathlib import Path
from typing import Any

from cluster.training.export import export_checkpoint
from moe_bitnet.checkpoint.sizes import folder_bytes
from moe_bitnet.packing import LAYOUTS

HELP = "write the model of a run's checkpoint, finished or not, as one checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", type=Path, help="folder of a training run, or one of its checkpoints/step_*")
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--layout", choices=LAYOUTS, help="pack ternary weights so (default: as they were trained)")
    parser.add_argument("--best", action="store_true", help="the checkpoint with the lowest validation loss")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export the model; returns what was read and written."""
    source = export_checkpoint(args.source, args.out, args.layout, is_best=args.best)
    return {"checkpoint": str(source), "model": str(args.out), "file_bytes": folder_bytes(args.out)}
