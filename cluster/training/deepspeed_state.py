"""Where DeepSpeed keeps parameters and AdamW's state, as fragments of global tensors.

ZeRO 1 and 2: parameters of a group lie one after the other in a flat float32 tensor, which is cut into equal
partitions; worker r updates partition r, and all gather the parameters afterwards. ZeRO 3: every parameter is cut into
equal partitions of its own, and worker r keeps partition r of each::

    ZeRO 1, 2   [ p0 ......... | p1 ... p2 ...... | padding ]      a partition may begin and end within a parameter
    ZeRO 3      p0 [ r0 | r1 ]   p1 [ r0 | r1 ]   p2 [ r0 | r1 padding ]

A frozen parameter has no state; whoever holds it whole gives an even share of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cluster.training.expert_parallel.sharding import global_shapes
from cluster.training.fragments import MOMENTS, Fragment, FragmentReader, adam_state, share_of
from moe_bitnet.model import MoETransformer


@dataclass(frozen=True, eq=False)
class _Piece:
    """A run of one parameter, or of a moment of it, that this worker keeps.

    Attributes:
        name: of the parameter.
        parameter: as this worker has it.
        moment: one of ``MOMENTS``, or ``None`` for the parameter itself.
        start: first element, in this worker's flattened parameter.
        values: live, flat.
    """

    name: str
    parameter: nn.Parameter
    moment: str | None
    start: int
    values: Tensor

    @property
    def key(self) -> str:
        """Name of the global tensor."""
        return self.name if self.moment is None else f"{self.name}.{self.moment}"


@dataclass(frozen=True, eq=False)
class ZeroState:
    """What one worker keeps of a model and its optimizer under ZeRO 1 to 3.

    Attributes:
        model: with DeepSpeed's parameters.
        zero: DeepSpeed's optimizer of that stage.
        optimizer: the AdamW within.
        stage: of ZeRO, 1 to 3.
        rank: of this worker.
        world_size: workers that train together.
    """

    model: MoETransformer
    zero: Any
    optimizer: Optimizer
    stage: int
    rank: int
    world_size: int

    def fragments(self) -> list[Fragment]:
        """Return what this worker keeps."""
        shapes = global_shapes(self.model)
        fragments = []
        for piece in self._pieces():
            shape, first = shapes[piece.name]
            fragments.append(Fragment(piece.key, shape, first + piece.start, piece.values.detach()))
        return fragments

    def load(self, read: FragmentReader, optimizer_step: int) -> None:
        """Fill what this worker keeps, and bring all workers' parameters up to date; every worker must call it.

        Args:
            read: gives runs of global tensors.
            optimizer_step: updates that were done.
        """
        shapes = global_shapes(self.model)
        with torch.no_grad():
            for piece in self._pieces():
                parameter, first = piece.parameter, shapes[piece.name][1]
                if not parameter.requires_grad and self.stage < 3:  # every worker holds it whole
                    parameter.copy_(read(piece.name, first, parameter.numel()).view(parameter.shape))
                else:
                    piece.values.copy_(read(piece.key, first + piece.start, piece.values.numel()))
            for flat in self._flat_partitions():
                adam_state(self.optimizer, flat)["step"].fill_(optimizer_step)
            if self.stage == 3:
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        self._update_partition(parameter)
            else:
                self.zero.update_lp_params()

    def _update_partition(self, parameter: Any) -> None:
        """Bring this worker's share of a parameter, which stage 3 computes with, up to date with its float32 one."""
        partition = parameter.ds_tensor
        partition.data.copy_(self.zero.get_local_fp32_param(parameter).view_as(partition))

    def _pieces(self) -> Iterator[_Piece]:
        for name, parameter in self.model.named_parameters():
            if self.stage == 3:
                yield from self._pieces_of_stage_3(name, parameter)
            elif not parameter.requires_grad:
                start, count = share_of(parameter.numel(), self.rank, self.world_size)
                yield _Piece(name, parameter, None, start, parameter.detach().reshape(-1)[start : start + count])
            else:
                yield from self._pieces_of_partition(name, parameter)

    def _pieces_of_partition(self, name: str, parameter: Any) -> Iterator[_Piece]:
        mapping = parameter._hp_mapping
        if mapping is None:  # in the partition of another worker
            return
        address = mapping.hp_fragment_address
        flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        start = mapping.lp_fragment_address.start
        yield from self._pieces_of_flat(name, parameter, start, flat, address.start, address.numel)

    def _pieces_of_stage_3(self, name: str, parameter: Any) -> Iterator[_Piece]:
        start = self.rank * parameter.ds_tensor.ds_numel
        count = max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))
        if not count:
            return
        if not parameter.requires_grad:
            yield _Piece(name, parameter, None, start, parameter.ds_tensor.detach().view(-1)[:count])
            return
        group, place, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        yield from self._pieces_of_flat(
            name, parameter, start, self.zero.fp32_partitioned_groups_flat[group], place, count
        )

    def _pieces_of_flat(
        self, name: str, parameter: nn.Parameter, start: int, flat: Tensor, place: int, count: int
    ) -> Iterator[_Piece]:
        """Yield a parameter and its moments, which lie at ``place`` of a flat partition and of its state."""
        state = adam_state(self.optimizer, flat)
        yield _Piece(name, parameter, None, start, flat.detach().narrow(0, place, count))
        for moment in MOMENTS:
            yield _Piece(name, parameter, moment, start, state[moment].narrow(0, place, count))

    def _flat_partitions(self) -> list[Tensor]:
        zero = self.zero
        flat: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return flat
