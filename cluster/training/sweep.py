"""A sweep: training runs that differ in size, precision, learning rate or seed, each in a folder of its own.

A cell is one run, by one process with torch alone. Its folder keeps what it was asked
for in ``cell.json``; a cell that has a summary, too, is finished and not run again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.training.config import TrainConfig
from cluster.training.run import build_torch_engine, run_training
from cluster.training.stopping import is_stop_requested
from cluster.training.summary import SUMMARY_NAME
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ConfigError, MoEBitNetError
from moe_bitnet.files import read_json, write_json_atomically

CELL_NAME = "cell.json"
# How a run computes and keeps what it made may change between two calls; what it is must not.
_FREE = ("out_folder", "threads_per_worker", "checkpoint_every_s", "num_kept_checkpoints", "max_loss_rise")


@dataclass(frozen=True)
class SweepCell:
    """One training run of a sweep.

    Attributes:
        size: name of the model's shape.
        model_config: the model.
        train_config: the settings; ``out_folder`` is the cell's folder.
    """

    size: str
    model_config: ModelConfig
    train_config: TrainConfig

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return self.train_config.out_folder

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name


@dataclass(frozen=True)
class CellResult:
    """How a cell ended.

    Attributes:
        summary: what ``summary.json`` holds, or ``None`` if the run did not come to its end.
        error: what went wrong, empty if nothing did; a run that was stopped has neither.
    """

    summary: dict[str, Any] | None = None
    error: str = ""


def check_cell(cell: SweepCell) -> None:
    """Check that a cell's folder is empty or holds the run that is asked for.

    Raises:
        ConfigError: it holds another one.
    """
    found, wanted = _read(cell.folder / CELL_NAME), _description(cell)
    if found is not None and found != wanted:
        names = {**found, **wanted}
        different = ", ".join(name for name in names if found.get(name) != wanted.get(name))
        raise ConfigError(
            f"{cell.folder}: holds a cell with other settings ({different}). Give the same ones, or another folder."
        )


def finished(cell: SweepCell) -> CellResult | None:
    """Return the result of a cell that is finished, ``None`` of another one."""
    summary = _read(cell.folder / SUMMARY_NAME) if (cell.folder / CELL_NAME).is_file() else None
    return None if summary is None else CellResult(summary)


def run_cell(cell: SweepCell, num_threads: int = 1) -> CellResult:
    """Train a cell, or go on with it, in this process.

    An error of ours is a result: other cells go on. So is a stop, which leaves a checkpoint.
    """
    torch.set_num_threads(num_threads)
    if is_stop_requested(cell.folder):
        return CellResult()
    try:
        check_cell(cell)
        write_json_atomically(cell.folder / CELL_NAME, _description(cell))
        config = cell.train_config
        return CellResult(run_training(cell.model_config, config, build_torch_engine(config), torch.device("cpu")))
    except MoEBitNetError as error:
        return CellResult(error=str(error))


def _description(cell: SweepCell) -> dict[str, Any]:
    settings = {name: value for name, value in cell.train_config.to_dict().items() if name not in _FREE}
    return {**cell.model_config.to_dict(), **settings}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
