"""From a checkpoint of a training run, in parts, to one that everything else reads: whole or packed."""

import shutil
from pathlib import Path

from cluster.training.checkpoint_folder import CHECKPOINTS_FOLDER, STATE_NAME, best_checkpoint
from cluster.training.checkpointing import latest_checkpoint, read_model, saved_config
from moe_bitnet.checkpoint.manifest import write_manifest
from moe_bitnet.checkpoint.native import save_model
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.errors import CheckpointError
from moe_bitnet.packing import Layout


def export_checkpoint(folder: Path, out: Path, layout: Layout | None = None, *, is_best: bool = False) -> Path:
    """Write the model of a checkpoint as a native one, for ``load_model``, from all workers' parts.

    The tokenizer of the training data goes beside it, if it is still there.

    Args:
        folder: of a checkpoint, or of a run, whose newest one is taken.
        out: where the model goes; replaced if it holds a checkpoint already.
        layout: pack ternary weights so; ``None`` writes latent or float weights.
        is_best: of a run, take the checkpoint with the lowest validation loss instead.
    Returns:
        the checkpoint that was exported.
    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or its model cannot be packed; or ``out`` holds
            something else.
        ConfigError: the layout is unknown.
        OSError: ``out`` cannot be written.
    """
    source = _find(folder, is_best)
    model = read_model(source)
    save_model(model if layout is None else pack_model(model, layout), out)
    tokenizer = saved_config(source).data_folder / "tokenizer.json"
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, out / tokenizer.name)
        write_manifest(out)
    return source


def _find(folder: Path, is_best: bool) -> Path:
    if (folder / STATE_NAME).is_file():
        return folder
    run = folder.parent if folder.name == CHECKPOINTS_FOLDER else folder
    found = best_checkpoint(run) if is_best else latest_checkpoint(run)
    if found is None:
        kind = "with a validation loss " if is_best else ""
        raise CheckpointError(
            f"{folder}: there is no checkpoint of a training run {kind}here. Give the out_folder of a run, or one of "
            f"the step_* folders in its {CHECKPOINTS_FOLDER}."
        )
    return found
