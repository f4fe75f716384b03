"""What a model weighs: one routed expert, and everything else."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_bitnet.checkpoint.native import is_matrix, is_routed_expert
from moe_bitnet.checkpoint.pack import packed_skeleton
from moe_bitnet.config import ModelConfig
from moe_bitnet.model import MoETransformer
from moe_bitnet.packing import Layout


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model's tensors.

    Attributes:
        expert_bytes: one routed expert of one layer.
        num_experts: routed experts of all layers together.
        home_bytes: embedding, head, attention, norms, routers and shared experts.
    """

    expert_bytes: int
    num_experts: int
    home_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.home_bytes + self.expert_bytes * self.num_experts


def model_sizes(config: ModelConfig, layout: Layout | None = None, float_bytes: int = 2) -> ModelSizes:
    """Weigh a model from its shape alone; nothing is allocated.

    Args:
        config: the shape.
        layout: packed ternary weights, or ``None`` for float ones.
        float_bytes: bytes of an element of a float matrix; norms, scales and routers have 4, and so has
            every float of a packed model.
    """
    with torch.device("meta"):
        model = MoETransformer(config)
    if layout is not None:
        packed_skeleton(model, layout)
        float_bytes = 4
    state = model.state_dict()
    experts = {name: tensor for name, tensor in state.items() if is_routed_expert(name)}
    num_experts = config.num_layers * config.num_experts
    all_bytes = sum(_num_bytes(name, tensor, float_bytes) for name, tensor in state.items())
    all_expert_bytes = sum(_num_bytes(name, tensor, float_bytes) for name, tensor in experts.items())
    assert all_expert_bytes % num_experts == 0
    return ModelSizes(all_expert_bytes // num_experts, num_experts, all_bytes - all_expert_bytes)


def bits_per_expert_weight(config: ModelConfig, layout: Layout) -> float:
    """Return the bits that a packed expert takes for each of its weights, padding, scales and norm included."""
    return 8 * model_sizes(config, layout).expert_bytes / (3 * config.hidden_size * config.intermediate_size)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _num_bytes(name: str, tensor: Tensor, float_bytes: int) -> int:
    return tensor.numel() * (float_bytes if is_matrix(name) else tensor.element_size())
