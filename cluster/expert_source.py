"""Where hosts get the weights of experts from: a checkpoint on disk, rows of a few tensors at a time.

The folder is one that ``save_model`` or ``pack_model`` wrote. Only the experts that are asked for are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from cluster.expert_store import ExpertSlice, to_array
from moe_bitnet.checkpoint.native import TENSORS_NAME, read_info
from moe_bitnet.errors import CheckpointError


@dataclass(frozen=True)
class CheckpointSource:
    """Experts of a checkpoint; the path must mean the same to every host that reads it.

    Attributes:
        folder: absolute path of the checkpoint.
    """

    folder: str

    @classmethod
    def of(cls, folder: Path | str) -> "CheckpointSource":
        """Name a checkpoint.

        Raises:
            CheckpointError: it is none.
        """
        path = Path(folder).resolve()
        read_info(path)
        return cls(str(path))

    def slice(self, layer_index: int, expert_ids: Sequence[int]) -> ExpertSlice:
        """Read some experts of one layer.

        Args:
            layer_index: which MoE layer.
            expert_ids: global ids, ascending.
        Raises:
            CheckpointError: the file is missing or damaged, or has no such expert.
            ShapeError: the ids are not ascending.
        """
        prefix = f"blocks.{layer_index}.moe.experts."
        path = Path(self.folder) / TENSORS_NAME
        try:
            with safetensors.safe_open(str(path), "pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118  it is no mapping
                tensors = {name.removeprefix(prefix): _rows(file.get_slice(name), expert_ids) for name in names}
        except (OSError, safetensors.SafetensorError, IndexError) as error:
            raise CheckpointError(
                f"{path}: experts {list(expert_ids)} of layer {layer_index} cannot be read ({error}). "
                f"Give every host the checkpoint that was placed."
            ) from error
        if not tensors:
            raise CheckpointError(f"{path}: layer {layer_index} has no experts. Give the checkpoint that was placed.")
        return ExpertSlice(layer_index, list(expert_ids), tensors)


def _rows(tensor: Any, expert_ids: Sequence[int]) -> np.ndarray:
    """Read rows by runs of consecutive ids."""
    num_experts = tensor.get_shape()[0]
    if not all(0 <= expert_id < num_experts for expert_id in expert_ids):
        raise IndexError(f"the file has {num_experts} experts a layer")
    runs: list[list[int]] = []
    for expert_id in expert_ids:
        if runs and expert_id == runs[-1][-1] + 1:
            runs[-1].append(expert_id)
        else:
            runs.append([expert_id])
    return to_array(torch.cat([tensor[run[0] : run[-1] + 1] for run in runs] or [tensor[0:0]]))
