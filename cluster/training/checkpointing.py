"""Checkpoints that a run resumes from: bit for bit with the same workers, and with any other number of them.

::

    <out>/checkpoints/step_000200/
    ├── config.json                            the model's shape
    ├── state.json                             TrainingState, data fingerprint, TrainConfig (workers, ZeRO stage, ...)
    ├── shard-00000-of-00004.safetensors ...   parameters and optimizer state: what each worker kept of them
    └── manifest.json                          sizes and sums of all of these

Each worker writes its part in the background (:mod:`cluster.training.checkpoint_writer`), and worker 0 gives the folder
its name when all are done (:mod:`cluster.training.checkpoint_folder`), so a killed writer leaves the one before. The
parts are runs of global tensors (:mod:`cluster.training.fragments`), with experts by their number in the model, so a
reader needs to know nothing of how the writers had divided them. Nothing is pickled: a checkpoint of a stranger can
be wrong, not run code.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.training.checkpoint_folder import CHECKPOINTS_FOLDER, STATE_NAME, checkpoint_folders
from cluster.training.config import TrainConfig
from cluster.training.fragment_file import FragmentFiles
from cluster.training.fragments import MOMENTS, FragmentReader
from cluster.training.state import TrainingState
from moe_bitnet.checkpoint.manifest import verify_manifest
from moe_bitnet.checkpoint.native import read_info
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import CheckpointError, ConfigError
from moe_bitnet.files import read_json
from moe_bitnet.model import MoETransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """What a checkpoint gives back.

    Attributes:
        read: gives runs of parameters and optimizer state, for ``Engine.load``.
        state: the run's progress.
        folder: where it is.
    """

    read: FragmentReader
    state: TrainingState
    folder: Path


def latest_checkpoint(out_folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or ``None`` if it has none.

    A damaged one is skipped with a warning. All files are read for this: one worker does it for all of them.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    folders = checkpoint_folders(out_folder)
    for folder in folders:
        try:
            verify_manifest(folder, required=(STATE_NAME,))
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
    differences = list_differences(found.to_dict(), model_config.to_dict())
    if differences:
        raise CheckpointError(
            f"{folder}: holds another model ({differences}). Give the same model config, or another out_folder."
        )
    record = _read_record(folder)
    if record["data_fingerprint"] != data_fingerprint:
        raise CheckpointError(
            f"{folder}: was trained on other data than {config.data_folder}. Give the same data, or another out_folder."
        )
    differences = list_differences(saved_config(folder).recipe(), config.recipe())
    if differences:
        raise ConfigError(
            f"{folder}: was trained with other settings ({differences}). Give the same ones, or another out_folder."
        )


def read_checkpoint(folder: Path) -> ResumePoint:
    """Open a checkpoint; the tensors themselves are read by whoever asks for them.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors do not fit ``config.json``.
    """
    state = TrainingState.from_dict(_read_record(folder)["state"], source=str(folder / STATE_NAME))
    files = FragmentFiles(sorted(folder.glob("*.safetensors")))
    with torch.device("meta"):
        model = MoETransformer(read_info(folder).config)
    files.check(_expected_shapes(model, files))
    return ResumePoint(files.read, state, folder)


def read_model(folder: Path) -> MoETransformer:
    """Read the model of a checkpoint, put together from all workers' parts.

    Args:
        folder: of a checkpoint; it is verified.
    Returns:
        in training mode, on the CPU, with latent weights.
    Raises:
        CheckpointError: missing, truncated or altered.
    """
    verify_manifest(folder, required=(STATE_NAME,))
    read = read_checkpoint(folder).read
    with torch.device("meta"):
        model = MoETransformer(read_info(folder).config)
    tensors = {
        name: read(name, 0, parameter.numel()).view(parameter.shape) for name, parameter in model.named_parameters()
    }
    model.load_state_dict(tensors, assign=True)
    return model.train()


def saved_config(folder: Path) -> TrainConfig:
    """Read the settings that a checkpoint was trained with.

    Raises:
        CheckpointError: they cannot be read.
        ConfigError: they hold values that are not allowed.
    """
    return TrainConfig.from_dict(_read_record(folder)["train_config"], source=str(folder / STATE_NAME))


def list_differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Say in words which settings differ."""
    return ", ".join(
        f"{name} was {found.get(name)!r}, now {value!r}" for name, value in wanted.items() if found.get(name) != value
    )


def _expected_shapes(model: nn.Module, files: FragmentFiles) -> dict[str, tuple[int, ...]]:
    """Return all tensors of a checkpoint; a parameter that is not trained has no optimizer state, thus none or both."""
    expected = {}
    for name, parameter in model.named_parameters():
        moments = [f"{name}.{moment}" for moment in MOMENTS]
        has_moments = any(moment in files.shapes for moment in moments)
        expected.update(dict.fromkeys([name, *(moments if has_moments else [])], tuple(parameter.shape)))
    return expected


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / STATE_NAME
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Delete {folder} to use the one before.") from error
    if not isinstance(record, dict) or not {"state", "data_fingerprint", "train_config"} <= record.keys():
        raise CheckpointError(f"{path}: is not the state of a training run. Delete {folder} to use the one before.")
    return record
