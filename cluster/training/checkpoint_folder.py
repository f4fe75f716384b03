"""Writing a checkpoint's folder: every worker its part, worker 0 the rest; it appears whole or not at all.

While it is written its name is hidden, so that what a killed worker leaves is never taken for a checkpoint.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from cluster.training.fragment_file import write_fragments
from cluster.training.fragments import Fragment
from moe_bitnet.checkpoint.manifest import write_manifest
from moe_bitnet.checkpoint.native import CONFIG_NAME, config_header
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import CheckpointError
from moe_bitnet.files import read_json, write_json_atomically

CHECKPOINTS_FOLDER = "checkpoints"
STATE_NAME = "state.json"
_FOLDER_PATTERN = re.compile(r"step_(\d{6,})")
_UNFINISHED = ".step_*"


def checkpoint_path(out_folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` steps."""
    return out_folder / CHECKPOINTS_FOLDER / f"step_{step:06d}"


def unfinished_path(out_folder: Path, step: int, attempt: int) -> Path:
    """Return where that checkpoint is written; ``attempt`` tells this run's workers from earlier ones."""
    return out_folder / CHECKPOINTS_FOLDER / f".step_{step:06d}.{attempt}"


def checkpoint_folders(out_folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, newest first; some may be damaged."""
    parent = out_folder / CHECKPOINTS_FOLDER
    found = [path for path in parent.glob("step_*") if _FOLDER_PATTERN.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(folder: Path) -> int:
    """Return the steps that were done when a checkpoint's folder was written."""
    return int(folder.name.removeprefix("step_"))


def write_part(folder: Path, fragments: list[Fragment], rank: int, world_size: int) -> None:
    """Write what one worker keeps, and beside it the sum that the manifest will list.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _part_name(rank, world_size)
    sha256 = write_fragments(path, fragments)
    write_json_atomically(_sum_path(path), {"sha256": sha256})


def commit(unfinished: Path, folder: Path, world_size: int, model_config: ModelConfig, record: dict[str, Any]) -> None:
    """Complete a folder that holds the parts of all workers, and give it its name.

    Args:
        unfinished: holds the parts.
        folder: takes its place; a damaged checkpoint there is deleted.
        world_size: parts that there must be.
        model_config: written as ``config.json``.
        record: written as ``state.json``.
    Raises:
        CheckpointError: a part is missing: the workers do not see the same folder.
        OSError: the disk is full, or the place cannot be written.
    """
    paths = [unfinished / _part_name(rank, world_size) for rank in range(world_size)]
    sums = {}
    for rank, path in enumerate(paths):
        try:
            sums[path.name] = str(read_json(_sum_path(path))["sha256"])
            path.stat()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: worker {rank} wrote its part of the checkpoint, and worker 0 does not see it. "
                f"Give an out_folder on a file system that all hosts share."
            ) from error
    write_json_atomically(unfinished / CONFIG_NAME, config_header(model_config, layout=None))
    write_json_atomically(unfinished / STATE_NAME, record)
    for path in paths:
        _sum_path(path).unlink()
    write_manifest(unfinished, known_sums=sums)
    _flush_folder(unfinished)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    _flush_folder(folder.parent)


def delete_old(out_folder: Path, num_kept: int) -> None:
    """Delete all checkpoints but the newest ``num_kept`` and the one with the lowest validation loss."""
    folders = checkpoint_folders(out_folder)
    best = best_checkpoint(out_folder)
    for folder in folders[num_kept:]:
        if folder != best:
            shutil.rmtree(folder)


def delete_unfinished(out_folder: Path) -> None:
    """Delete what killed workers left."""
    for leftover in (out_folder / CHECKPOINTS_FOLDER).glob(_UNFINISHED):
        shutil.rmtree(leftover, ignore_errors=True)


def best_checkpoint(out_folder: Path) -> Path | None:
    """Return the checkpoint with the lowest validation loss, the oldest of equal ones; ``None`` without any."""
    losses = {folder: _loss_of(folder) for folder in reversed(checkpoint_folders(out_folder))}
    known = {folder: loss for folder, loss in losses.items() if loss is not None}
    return min(known, key=known.__getitem__, default=None)


def _loss_of(folder: Path) -> float | None:
    try:
        loss = read_json(folder / STATE_NAME)["state"]["validation_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, float) else None


def _part_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def _sum_path(part: Path) -> Path:
    return part.with_suffix(".json")


def _flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can open folders at all."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
