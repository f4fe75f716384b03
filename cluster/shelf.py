"""The weights of all experts that are away from home, kept where hosts can fetch them: at the start and after a loss.

Either a checkpoint that every host can read, or Ray's object store, which holds one object for each device and layer in
shared memory (and on disk when that is full) as long as the shelf lives.
"""

from collections.abc import Sequence
from typing import Any

import ray

from cluster.actors import LoadOrder
from cluster.expert_source import CheckpointSource
from cluster.expert_store import ExpertSlice, slice_experts
from moe_bitnet.experts import GroupedExperts


class Shelf:
    """Writes the orders by which hosts load experts.

    Args:
        checkpoint: read by the hosts themselves; without it, slices must be :meth:`put` here.
    """

    def __init__(self, checkpoint: CheckpointSource | None) -> None:
        self._checkpoint = checkpoint
        self._references: dict[tuple[int, int], Any] = {}  # (layer, expert) → the object that holds it

    def put(self, experts: GroupedExperts, layer_index: int, expert_ids: Sequence[int]) -> None:
        """Keep some experts of a layer, if hosts do not read a checkpoint; those that are here already are skipped."""
        missing = [each for each in expert_ids if (layer_index, each) not in self._references]
        if missing and self._checkpoint is None:
            self.put_slice(slice_experts(experts, layer_index, missing))

    def put_slice(self, part: ExpertSlice) -> None:
        """Keep a slice, if hosts do not read a checkpoint."""
        if self._checkpoint is None:
            reference = ray.put(part)
            self._references.update({(part.layer_index, expert_id): reference for expert_id in part.expert_ids})

    def lacks(self, layer_index: int, expert_ids: Sequence[int]) -> list[int]:
        """Return the experts that no order could bring."""
        if self._checkpoint is not None:
            return []
        return [expert_id for expert_id in expert_ids if (layer_index, expert_id) not in self._references]

    def order(self, layer_index: int, expert_ids: Sequence[int]) -> LoadOrder:
        """Write an order for some experts of a layer."""
        if self._checkpoint is not None:
            return LoadOrder(layer_index, tuple(expert_ids), self._checkpoint)
        references = {id(each): each for each in (self._references[layer_index, one] for one in expert_ids)}
        return LoadOrder(layer_index, tuple(expert_ids), tuple(references.values()))
