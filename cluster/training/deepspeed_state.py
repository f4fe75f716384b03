"""Where DeepSpeed keeps parameters and AdamW's state, as fragments of global tensors.

ZeRO 1 and 2: parameters of a group lie one after the other in a flat float32 tensor, which is cut into equal
partitions; worker r updates partition r, and all gather the parameters afterwards. ZeRO 3: every parameter is cut into
equal partitions of its own, and worker r keeps partition r of each::

    ZeRO 1, 2   [ p0 ......... | p1 ... p2 ...... | padding ]      a partition may begin and end within a parameter
    ZeRO 3      p0 [ r0 | r1 ]   p1 [ r0 | r1 ]   p2 [ r0 | r1 padding ]

A frozen parameter has no state; whoever holds it whole gives an even share of it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cluster.training.expert_parallel.sharding import global_shapes
from cluster.training.fragments import MOMENTS, Fragment, FragmentReader, adam_state, share_of
from moe_bitnet.model import MoETransformer


def zero_fragments(
    model: MoETransformer, zero: Any, optimizer: Optimizer, stage: int, rank: int, world_size: int
) -> list[Fragment]:
    """Return what this worker keeps.

    Args:
        model: with DeepSpeed's parameters.
        zero: DeepSpeed's optimizer of stage 1, 2 or 3.
        optimizer: the AdamW within.
        stage: of ZeRO.
        rank: of this worker.
        world_size: workers that train together.
    """
    shapes = global_shapes(model)
    fragments = []
    for name, parameter, moment, start, values in _pieces(model, zero, optimizer, stage, rank, world_size):
        shape, first = shapes[name]
        key = name if moment is None else f"{name}.{moment}"
        fragments.append(Fragment(key, shape, first + start, values.detach()))
        del parameter
    return fragments


def load_zero(
    model: MoETransformer,
    zero: Any,
    optimizer: Optimizer,
    stage: int,
    rank: int,
    world_size: int,
    read: FragmentReader,
    optimizer_step: int,
) -> None:
    """Fill what this worker keeps, and bring all workers' parameters up to date; every worker must call it.

    Args:
        model: with DeepSpeed's parameters.
        zero: DeepSpeed's optimizer of stage 1, 2 or 3.
        optimizer: the AdamW within.
        stage: of ZeRO.
        rank: of this worker.
        world_size: workers that train together.
        read: gives runs of global tensors.
        optimizer_step: updates that were done.
    """
    shapes = global_shapes(model)
    with torch.no_grad():
        for name, parameter, moment, start, values in _pieces(model, zero, optimizer, stage, rank, world_size):
            first = shapes[name][1]
            if not parameter.requires_grad and stage < 3:  # every worker holds it whole
                parameter.copy_(read(name, first, parameter.numel()).view(parameter.shape))
            else:
                values.copy_(read(name if moment is None else f"{name}.{moment}", first + start, values.numel()))
        for flat in _flat_partitions(zero, stage):
            adam_state(optimizer, flat)["step"].fill_(optimizer_step)
        if stage == 3:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    master = zero.get_local_fp32_param(parameter)
                    parameter.ds_tensor.data.copy_(master.view_as(parameter.ds_tensor))  # type: ignore[attr-defined]
        else:
            zero.update_lp_params()


def _pieces(
    model: nn.Module, zero: Any, optimizer: Optimizer, stage: int, rank: int, world_size: int
) -> Iterator[tuple[str, nn.Parameter, str | None, int, Tensor]]:
    """Yield name, parameter, moment or ``None``, first element within this worker's parameter, and live values."""
    for name, parameter in model.named_parameters():
        if stage == 3:
            yield from _pieces_of_stage_3(name, parameter, zero, optimizer, rank)
        elif not parameter.requires_grad:
            start, count = share_of(parameter.numel(), rank, world_size)
            yield name, parameter, None, start, parameter.detach().reshape(-1)[start : start + count]
        else:
            yield from _pieces_of_partition(name, parameter, zero, optimizer)


def _pieces_of_partition(
    name: str, parameter: Any, zero: Any, optimizer: Optimizer
) -> Iterator[tuple[str, nn.Parameter, str | None, int, Tensor]]:
    mapping = parameter._hp_mapping
    if mapping is None:  # in the partition of another worker
        return
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    place = (mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)
    state = adam_state(optimizer, flat)
    start = mapping.lp_fragment_address.start
    yield name, parameter, None, start, flat.detach().narrow(0, *place)
    for moment in MOMENTS:
        yield name, parameter, moment, start, state[moment].narrow(0, *place)


def _pieces_of_stage_3(
    name: str, parameter: Any, zero: Any, optimizer: Optimizer, rank: int
) -> Iterator[tuple[str, nn.Parameter, str | None, int, Tensor]]:
    start = rank * parameter.ds_tensor.ds_numel
    count = max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))
    if not count:
        return
    if not parameter.requires_grad:
        yield name, parameter, None, start, parameter.ds_tensor.detach().view(-1)[:count]
        return
    group, place, _ = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[group]
    state = adam_state(optimizer, flat)
    yield name, parameter, None, start, flat.detach().narrow(0, place, count)
    for moment in MOMENTS:
        yield name, parameter, moment, start, state[moment].narrow(0, place, count)


def _flat_partitions(zero: Any, stage: int) -> list[Tensor]:
    flat: list[Tensor] = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    return flat
