"""Checkpoints that a run resumes from, bit for bit.

::

    <out>/checkpoints/step_000200/
    ├── config.json, model.safetensors    a native checkpoint, which load_model reads as it is
    ├── optimizer.safetensors             step, exp_avg, exp_avg_sq by parameter name
    ├── state.json                        TrainingState, data fingerprint, TrainConfig
    └── manifest.json                     sizes and sums of all of these

A folder appears whole or not at all, so a killed writer leaves the one before.
Nothing is pickled: a checkpoint of a stranger can be wrong, not run code.
"""

import logging
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from torch.optim import Optimizer

from cluster.training.config import TrainConfig
from cluster.training.optimizer import load_optimizer_tensors, optimizer_tensors
from cluster.training.state import TrainingState
from moe_bitnet.checkpoint.manifest import verify_manifest, write_manifest
from moe_bitnet.checkpoint.native import load_model, read_info, read_tensors, write_model
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import CheckpointError, ConfigError
from moe_bitnet.files import read_json, replace_directory, write_json_atomically
from moe_bitnet.model import MoETransformer

logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
_OPTIMIZER_NAME = "optimizer.safetensors"
_STATE_NAME = "state.json"
_FOLDER_PATTERN = re.compile(r"step_(\d{6,})")
_UNFINISHED_PATTERN = ".step_*"


@dataclass(frozen=True)
class ResumePoint:
    """What a checkpoint gives back.

    Attributes:
        model: in training mode, on the CPU.
        optimizer_tensors: for :func:`cluster.training.optimizer.load_optimizer_tensors`.
        state: the run's progress.
        folder: where it was read.
    """

    model: MoETransformer
    optimizer_tensors: dict[str, Tensor]
    state: TrainingState
    folder: Path

    def restore_optimizer(self, model: MoETransformer, optimizer: Optimizer) -> None:
        """Give a fresh optimizer of ``model`` (this one, perhaps moved to a GPU) its state back."""
        load_optimizer_tensors(model, optimizer, self.optimizer_tensors, str(self.folder / _OPTIMIZER_NAME))


def write_checkpoint(
    out_folder: Path,
    model: MoETransformer,
    optimizer: Optimizer,
    state: TrainingState,
    config: TrainConfig,
    data_fingerprint: str,
) -> Path:
    """Write a checkpoint after ``state.step`` steps, then delete the oldest beyond ``config.num_kept_checkpoints``.

    Returns:
        its folder.
    Raises:
        CheckpointError: it cannot be written (a full disk, missing rights); older ones stay.
    """
    folder = out_folder / CHECKPOINTS_FOLDER / f"step_{state.step:06d}"
    try:
        with replace_directory(folder) as new:
            write_model(model, new)
            tensors = {name: x.cpu().contiguous() for name, x in optimizer_tensors(model, optimizer).items()}
            safetensors.torch.save_file(tensors, str(new / _OPTIMIZER_NAME))
            record = {
                "state": asdict(state),
                "data_fingerprint": data_fingerprint,
                "train_config": config.to_dict(),
            }
            write_json_atomically(new / _STATE_NAME, record)
            write_manifest(new)
        _delete_old(out_folder, config.num_kept_checkpoints)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the checkpoint cannot be written ({error}). Free some disk space or choose another out_folder; "
            f"the same command resumes from the checkpoint before."
        ) from error
    return folder


def latest_checkpoint(out_folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or ``None`` if it has none.

    A damaged one is skipped with a warning.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    folders = _checkpoint_folders(out_folder)
    for folder in folders:
        try:
            verify_manifest(folder)
            return folder
        except CheckpointError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
    if folders:
        raise CheckpointError(
            f"{out_folder / CHECKPOINTS_FOLDER}: all {len(folders)} checkpoints are damaged. "
            f"Delete that folder to start over, or choose another out_folder."
        )
    return None


def check_resumable(folder: Path, model_config: ModelConfig, config: TrainConfig, data_fingerprint: str) -> None:
    """Check that a checkpoint belongs to the run that is asked for.

    Raises:
        CheckpointError: it holds another model, or another text was trained on.
        ConfigError: the training recipe changed.
    """
    found = read_info(folder).config
    differences = _differences(found.to_dict(), model_config.to_dict())
    if differences:
        raise CheckpointError(
            f"{folder}: holds another model ({differences}). Give the same model config, or another out_folder."
        )
    record = _read_record(folder)
    if record["data_fingerprint"] != data_fingerprint:
        raise CheckpointError(
            f"{folder}: was trained on other data than {config.data_folder}. Give the same data, or another out_folder."
        )
    saved = TrainConfig.from_dict(record["train_config"], source=str(folder / _STATE_NAME))
    differences = _differences(saved.recipe(), config.recipe())
    if differences:
        raise ConfigError(
            f"{folder}: was trained with other settings ({differences}). Give the same ones, or another out_folder."
        )


def read_checkpoint(folder: Path) -> ResumePoint:
    """Read a checkpoint, verified.

    Raises:
        CheckpointError: missing, truncated or altered.
    """
    model = load_model(folder).train()
    state = TrainingState.from_dict(_read_record(folder)["state"], source=str(folder / _STATE_NAME))
    return ResumePoint(model, read_tensors(folder / _OPTIMIZER_NAME), state, folder)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / _STATE_NAME
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Delete {folder} to use the one before.") from error
    if not isinstance(record, dict) or not {"state", "data_fingerprint", "train_config"} <= record.keys():
        raise CheckpointError(f"{path}: is not the state of a training run. Delete {folder} to use the one before.")
    return record


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} was {found.get(name)!r}, now {value!r}" for name, value in wanted.items() if found.get(name) != value
    )


def _checkpoint_folders(out_folder: Path) -> list[Path]:
    parent = out_folder / CHECKPOINTS_FOLDER
    found = [(match, path) for path in parent.glob("step_*") if (match := _FOLDER_PATTERN.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda pair: int(pair[0][1]), reverse=True)]


def _delete_old(out_folder: Path, num_kept: int) -> None:
    for folder in _checkpoint_folders(out_folder)[num_kept:]:
        shutil.rmtree(folder)
    for leftover in (out_folder / CHECKPOINTS_FOLDER).glob(_UNFINISHED_PATTERN):  # of writers that were killed
        shutil.rmtree(leftover)
