"""The experts that one device holds: loaded, dropped and run by their global ids.

::

    rows [n, H], row and expert of each pair [m] ──sort by expert──► GroupedExperts ──unsort──► outputs [m, H]

A layer's experts are in one or a few groups: a group is what was loaded at once. Loading adds a group beside those that
are at work, so that a new plan's experts can come while the old plan is served; dropping merges what is left.
No row's result depends on its neighbours, nor on the group that computes it: outputs are those of a whole layer in
one process, bit for bit.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ClusterError, ConfigError, PlacementError, ShapeError
from moe_bitnet.experts import ExpertInput, GroupedExperts, build_experts
from moe_bitnet.model import Block, MoETransformer
from moe_bitnet.packed_module import arrange_weights
from moe_bitnet.packing import Layout


@dataclass(frozen=True)
class ExpertSlice:
    """Some experts of one layer, in a form that travels.

    Attributes:
        layer_index: which MoE layer.
        expert_ids: global ids, ascending, each once.
        tensors: the state of a :class:`moe_bitnet.experts.GroupedExperts` with these experts alone, as arrays.

    Raises:
        ShapeError: the ids are not ascending, or a tensor is not one of as many experts.
    """

    layer_index: int
    expert_ids: list[int]
    tensors: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if any(left >= right for left, right in itertools.pairwise(self.expert_ids)):
            raise ShapeError(f"ExpertSlice: expert ids are {self.expert_ids}; give each once, in ascending order.")
        for name, array in self.tensors.items():
            if array.ndim == 0 or len(array) != len(self.expert_ids):
                raise ShapeError(
                    f"ExpertSlice: {name} has the shape {list(array.shape)}; "
                    f"give [{len(self.expert_ids)}, ...], one row for each expert."
                )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for array in self.tensors.values())


@dataclass(frozen=True, eq=False)
class _Group:
    """Experts that were loaded together."""

    expert_ids: np.ndarray  # int64, ascending
    module: GroupedExperts
    num_bytes: int


class ExpertStore:
    """Holds experts of many layers for one device.

    One thread may load and drop while another computes: a layer's groups are replaced as a whole.

    Args:
        device_name: for messages.
        usable_bytes: what the experts may fill.
        config: shape and recipe of the model.
        layout: how the experts are packed; ``None`` for float experts.
    """

    def __init__(self, device_name: str, usable_bytes: int, config: ModelConfig, layout: Layout | None) -> None:
        self.device_name = device_name
        self.usable_bytes = usable_bytes
        self.config = config
        self._layout: Layout | None = layout
        self._groups: dict[int, tuple[_Group, ...]] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of all experts held here, as they travel."""
        return sum(group.num_bytes for groups in self._groups.values() for group in groups)

    def expert_ids(self, layer_index: int) -> list[int]:
        """Return the ids of the experts of a layer that are held here, ascending."""
        return sorted(int(each) for group in self._groups.get(layer_index, ()) for each in group.expert_ids)

    def all_expert_ids(self) -> dict[int, list[int]]:
        """Return the ids of all experts held here, by layer."""
        return {layer_index: self.expert_ids(layer_index) for layer_index in self._groups}

    def lacks(self, layer_index: int, expert_ids: Sequence[int]) -> list[int]:
        """Return those of some experts of a layer that are not held here, ascending."""
        return sorted(set(expert_ids) - set(self.expert_ids(layer_index)))

    def load(self, experts: ExpertSlice) -> int:
        """Take experts of one layer beside those that are here.

        Returns:
            bytes held afterwards.
        Raises:
            PlacementError: they do not fit into the device's memory; nothing is loaded.
            ClusterError: an expert is here already.
        """
        held = set(self.expert_ids(experts.layer_index))
        repeated = sorted(held & set(experts.expert_ids))
        if repeated:
            raise ClusterError(
                f"host {self.device_name!r} holds expert {repeated[0]} of layer {experts.layer_index} already. "
                f"Send only experts that it lacks."
            )
        self._check_room(experts.num_bytes)
        if experts.expert_ids:
            group = self._build(experts)
            self._replace(experts.layer_index, (*self._groups.get(experts.layer_index, ()), group))
        return self.held_bytes

    def keep_only(self, layer_index: int, expert_ids: Sequence[int]) -> int:
        """Drop the experts of a layer that are not in ``expert_ids``, and merge the others into one group.

        While it merges, the layer's experts are held twice: the old groups go on computing.

        Returns:
            bytes held afterwards.
        """
        groups = self._groups.get(layer_index, ())
        wanted = np.array(sorted(expert_ids), np.int64)
        if all(np.isin(group.expert_ids, wanted).all() for group in groups) and len(groups) <= 1:
            return self.held_bytes
        kept = self.slice(layer_index, [each for each in self.expert_ids(layer_index) if each in wanted])
        self._replace(layer_index, () if kept is None else (self._build(kept),))
        return self.held_bytes

    def keep(self, kept: Mapping[int, Sequence[int]]) -> int:
        """Drop the experts of each layer that are not named (layer → ids), as :meth:`keep_only`."""
        for layer_index, expert_ids in kept.items():
            self.keep_only(layer_index, expert_ids)
        return self.held_bytes

    def slice(self, layer_index: int, expert_ids: Sequence[int]) -> ExpertSlice | None:
        """Copy experts that are held here into a form that travels, or return ``None`` for no ids.

        Raises:
            ClusterError: an expert is not held here.
        """
        wanted = np.array(expert_ids, np.int64)
        missing = self.lacks(layer_index, expert_ids)
        if missing:
            self._refuse(layer_index, missing[0])
        groups = self._groups.get(layer_index, ())
        positions = [np.flatnonzero(np.isin(group.expert_ids, wanted)) for group in groups]
        parts = [_slice(group, layer_index, rows) for group, rows in zip(groups, positions, strict=True) if len(rows)]
        return join_slices(parts, expert_ids) if parts else None

    def prepare(self, hidden_states: Tensor) -> ExpertInput:
        """Turn float rows ``[n, H]`` into what the experts take.

        Raises:
            ClusterError: no expert is held here.
        """
        for groups in self._groups.values():
            return groups[0].module.prepare(hidden_states)
        raise ClusterError(f"host {self.device_name!r} holds no expert. The sender follows another placement.")

    @torch.inference_mode()
    def compute(self, layer_index: int, rows: ExpertInput, pairs_per_row: Tensor, expert_ids: Tensor) -> Tensor:
        """Run each row through each of its experts.

        Args:
            layer_index: which MoE layer.
            rows: ``[n, H]``.
            pairs_per_row: int64 ``[n]``, experts of each row.
            expert_ids: int64 ``[m]``, those of row 0 first.
        Returns:
            float32 ``[m, H]``, unweighted, in the order of ``expert_ids``.
        Raises:
            ClusterError: an expert is not held here.
        """
        ids = expert_ids.numpy()
        order = np.argsort(ids, kind="stable")
        row_of_pair = np.repeat(np.arange(len(pairs_per_row)), pairs_per_row.numpy())[order]
        sorted_ids = ids[order]
        outputs = torch.empty(len(ids), rows.rows.shape[1])
        is_missing = np.ones(len(ids), bool)
        for group in self._groups.get(layer_index, ()):
            local = np.searchsorted(group.expert_ids, sorted_ids)
            is_here = group.expert_ids[np.minimum(local, len(group.expert_ids) - 1)] == sorted_ids
            if is_here.any():
                taken = rows.take(torch.from_numpy(row_of_pair[is_here]))
                offsets = np.searchsorted(local[is_here], np.arange(len(group.expert_ids) + 1))
                outputs[torch.from_numpy(order[is_here])] = group.module.compute(taken, torch.from_numpy(offsets))
                is_missing &= ~is_here
        if is_missing.any():
            self._refuse(layer_index, int(sorted_ids[is_missing][0]))
        return outputs

    def _replace(self, layer_index: int, groups: tuple[_Group, ...]) -> None:
        """Put other groups in the place of a layer's; the old dictionary stays as it is for those who read it."""
        layers = {**self._groups, layer_index: groups}
        self._groups = {index: each for index, each in layers.items() if each}

    def _refuse(self, layer_index: int, expert_id: int) -> None:
        held = self.expert_ids(layer_index)
        if not held:
            raise ClusterError(f"host {self.device_name!r} holds no expert of layer {layer_index}.")
        raise ClusterError(
            f"host {self.device_name!r} does not hold expert {expert_id} of layer {layer_index}; "
            f"it holds {held}. The sender follows another placement."
        )

    def _check_room(self, num_bytes: int) -> None:
        held_bytes = self.held_bytes
        if held_bytes + num_bytes > self.usable_bytes:
            missing = held_bytes + num_bytes - self.usable_bytes
            raise PlacementError(
                f"host {self.device_name!r} holds {held_bytes} of {self.usable_bytes} bytes and was asked to "
                f"load {num_bytes} more: {missing} bytes are missing. Place fewer experts on this device."
            )

    def _build(self, experts: ExpertSlice) -> _Group:
        with torch.device("meta"):
            module = build_experts(self.config, len(experts.expert_ids), self._layout)
        # copied, because arrays from Ray's object store are read-only views
        state = {name: torch.from_numpy(array.copy()) for name, array in experts.tensors.items()}
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:  # torch's word for other names or shapes
            raise ConfigError(
                f"host {self.device_name!r}: the experts of layer {experts.layer_index} are none of this model "
                f"({error}). Send those of the model that the host was started for."
            ) from error
        del state
        arrange_weights(module)
        return _Group(np.array(experts.expert_ids, np.int64), module.eval(), experts.num_bytes)


def local_experts(model: MoETransformer) -> list[GroupedExperts]:
    """Return the experts of each layer of a model.

    Raises:
        ClusterError: they were replaced by other executors, so their weights are not here.
    """
    layers = []
    for block in model.blocks:
        assert isinstance(block, Block)
        experts = block.moe.experts
        if not isinstance(experts, GroupedExperts):
            raise ClusterError("the experts of this model run elsewhere already. Load the model again.")
        layers.append(experts)
    return layers


def slice_experts(experts: GroupedExperts, layer_index: int, expert_ids: Sequence[int]) -> ExpertSlice:
    """Copy some experts of a layer into a form that travels.

    Args:
        experts: all experts of the layer.
        layer_index: which layer it is.
        expert_ids: which experts, ascending.
    """
    index = torch.tensor(list(expert_ids), dtype=torch.int64)
    tensors = {name: to_array(tensor.detach()[index]) for name, tensor in experts.state_dict().items()}
    return ExpertSlice(layer_index, list(expert_ids), tensors)


def to_array(tensor: Tensor) -> np.ndarray:
    """View a tensor as an array; bfloat16, which NumPy lacks, becomes float32: the same numbers in twice the bytes."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _slice(group: _Group, layer_index: int, positions: np.ndarray) -> ExpertSlice:
    part = slice_experts(group.module, layer_index, positions.tolist())
    return ExpertSlice(layer_index, group.expert_ids[positions].tolist(), part.tensors)


def join_slices(parts: Sequence[ExpertSlice], expert_ids: Sequence[int]) -> ExpertSlice:
    """Pick experts of one layer out of slices that hold them, among others perhaps.

    Args:
        parts: of one layer, at least one.
        expert_ids: which experts, ascending.
    Raises:
        ClusterError: an expert is in none of the parts.
    """
    place = {expert_id: (part, row) for part in parts for row, expert_id in enumerate(part.expert_ids)}
    missing = [expert_id for expert_id in expert_ids if expert_id not in place]
    if missing:
        raise ClusterError(
            f"experts {missing} of layer {parts[0].layer_index} are in none of the slices given, "
            f"which hold {sorted(place)}. Give slices that hold them."
        )
    chosen = [place[expert_id] for expert_id in expert_ids]
    tensors = {name: np.stack([part.tensors[name][row] for part, row in chosen]) for name in parts[0].tensors}
    return ExpertSlice(parts[0].layer_index, list(expert_ids), tensors)
