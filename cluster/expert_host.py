"""The experts of one device: a plain class that answers frames, whatever carries them.

::

    dispatch frame ──► check plan, layer, experts, rows ──► rows sorted by expert ──► GroupedExperts ──► combine frame

It refuses weights that exceed its device's memory, and frames of another plan.
An expert that it does not hold is an error, never skipped.

All rows of an expert come to one host in the order in which the local executor
has them, and no row's result depends on its neighbours: what comes out is what
the local experts give, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.transport.codec import decode_dispatch, encode
from cluster.transport.frames import CombineFrame, DispatchFrame
from cluster.transport.header import FrameLimits
from cluster.transport.row_format import CombineFormat
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ClusterError, PlacementError
from moe_bitnet.experts import ExpertInput, GroupedExperts, build_experts
from moe_bitnet.packed_module import arrange_weights
from moe_bitnet.packing import Layout

_COMBINE_DTYPES: dict[CombineFormat, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ExpertSlice:
    """The experts of one layer that one device holds.

    Attributes:
        layer_index: which MoE layer.
        expert_ids: global ids, ascending.
        tensors: the state of a :class:`moe_bitnet.experts.GroupedExperts` with these experts alone, as arrays.
    """

    layer_index: int
    expert_ids: list[int]
    tensors: Mapping[str, np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for array in self.tensors.values())


class ExpertHost:
    """Holds experts of many layers for one device and runs them on rows that arrive.

    Args:
        device_name: for messages.
        usable_bytes: what the experts may fill.
        config: shape and recipe of the model.
        layout: how the experts are packed; ``None`` for float experts.
        combine: format of the rows on the way back.
        epoch: number of the plan that this host follows.
    """

    def __init__(
        self,
        device_name: str,
        usable_bytes: int,
        config: ModelConfig,
        layout: Layout | None,
        combine: CombineFormat = "float32",
        epoch: int = 0,
    ) -> None:
        self._device_name = device_name
        self._usable_bytes = usable_bytes
        self._config = config
        self._layout: Layout | None = layout
        self._combine_dtype = _COMBINE_DTYPES[combine]
        self._epoch = epoch
        self._layers: dict[int, tuple[GroupedExperts, Tensor]] = {}
        self._limits = FrameLimits(max_hidden_size=config.hidden_size)
        self.held_bytes = 0

    def load(self, experts: ExpertSlice) -> int:
        """Take the experts of one layer.

        Returns:
            bytes held by this host afterwards.
        Raises:
            PlacementError: they do not fit into the device's memory; nothing is loaded.
            ClusterError: experts of this layer are here already.
        """
        if experts.layer_index in self._layers:
            raise ClusterError(
                f"host {self._device_name!r} holds experts of layer {experts.layer_index} already. "
                f"Send all experts of a layer at once."
            )
        if self.held_bytes + experts.num_bytes > self._usable_bytes:
            missing = self.held_bytes + experts.num_bytes - self._usable_bytes
            raise PlacementError(
                f"host {self._device_name!r} holds {self.held_bytes} of {self._usable_bytes} bytes and was asked to "
                f"load {experts.num_bytes} more: {missing} bytes are missing. Place fewer experts on this device."
            )
        with torch.device("meta"):
            module = build_experts(self._config, len(experts.expert_ids), self._layout)
        # copied, because arrays from Ray's object store are read-only views
        state = {name: torch.from_numpy(array.copy()) for name, array in experts.tensors.items()}
        module.load_state_dict(state, assign=True)
        del state
        arrange_weights(module)
        self._layers[experts.layer_index] = (module.eval(), torch.tensor(experts.expert_ids, dtype=torch.int32))
        self.held_bytes += experts.num_bytes
        return self.held_bytes

    @torch.inference_mode()
    def answer(self, buffer: bytes) -> bytes:
        """Run one dispatch frame and return the combine frame.

        Raises:
            ClusterError: the frame is damaged, follows another plan, asks for an expert that is not here,
                or its rows are none that this model's experts take.
        """
        frame = decode_dispatch(buffer, self._limits)
        if frame.epoch != self._epoch:
            raise ClusterError(
                f"host {self._device_name!r} follows plan {self._epoch}, the frame follows plan {frame.epoch}. "
                f"Send it again to the host of the current plan."
            )
        experts, local_expert_indices = self._find_experts(frame)
        rows = self._prepare(experts, frame).take(frame.row_indices.long())
        outputs = _run_pairs(experts, rows, local_expert_indices).to(self._combine_dtype)
        return encode(CombineFrame(frame.layer_index, self._epoch, outputs))

    def _find_experts(self, frame: DispatchFrame) -> tuple[GroupedExperts, Tensor]:
        """Return the layer's experts and, for each of the frame's pairs, the index of its expert among them."""
        if frame.layer_index not in self._layers:
            raise ClusterError(f"host {self._device_name!r} holds no expert of layer {frame.layer_index}.")
        experts, held_ids = self._layers[frame.layer_index]
        is_held = torch.isin(frame.expert_ids, held_ids)
        if not bool(is_held.all()):
            missing = sorted(set(frame.expert_ids[~is_held].tolist()))
            raise ClusterError(
                f"host {self._device_name!r} does not hold expert {missing[0]} of layer {frame.layer_index}; "
                f"it holds {held_ids.tolist()}. The sender follows another placement."
            )
        return experts, torch.searchsorted(held_ids, frame.expert_ids)

    def _prepare(self, experts: GroupedExperts, frame: DispatchFrame) -> ExpertInput:
        """Return the frame's rows as the experts take them; float rows for ternary experts are quantized here."""
        hidden_size = self._config.hidden_size
        if frame.rows.shape[1] != hidden_size:
            raise ClusterError(
                f"host {self._device_name!r} serves a model with hidden_size {hidden_size}, the frame has rows of "
                f"{frame.rows.shape[1]}. The sender runs another model."
            )
        if frame.scales is None:
            return experts.prepare(frame.rows.float())
        if not self._config.is_ternary:
            raise ClusterError(
                f"host {self._device_name!r} holds float experts, which take no int8 rows. "
                f"Dispatch in float16 or float32."
            )
        return ExpertInput(frame.rows, frame.scales)


def _run_pairs(experts: GroupedExperts, rows: ExpertInput, local_expert_indices: Tensor) -> Tensor:
    """Run each row ``[m, H]`` through its expert (int64 ``[m]``, ascending); returns float32 ``[m, H]``."""
    if not len(local_expert_indices):
        return torch.empty(rows.rows.shape)
    expert_offsets = torch.searchsorted(local_expert_indices, torch.arange(experts.num_experts + 1))
    return experts.compute(rows, expert_offsets)


def slice_experts(experts: GroupedExperts, layer_index: int, expert_ids: list[int]) -> ExpertSlice:
    """Copy some experts of a layer into a form that travels.

    Args:
        experts: all experts of the layer.
        layer_index: which layer it is.
        expert_ids: which experts, ascending.
    """
    index = torch.tensor(expert_ids, dtype=torch.int64)
    tensors = {name: tensor.detach()[index].numpy() for name, tensor in experts.state_dict().items()}
    return ExpertSlice(layer_index, expert_ids, tensors)
