"""A model's experts divided among workers, and put together again."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.training.config import ExchangeDtype
from cluster.training.expert_parallel.division import ExpertDivision
from cluster.training.expert_parallel.exchange import ExpertGroup
from cluster.training.expert_parallel.executor import ExpertParallelExperts
from moe_bitnet.checkpoint.native import is_routed_expert
from moe_bitnet.experts import GroupedExperts, build_experts
from moe_bitnet.model import Block, MoETransformer


def shard_experts(
    model: MoETransformer, workers: ExpertGroup, exchange_dtype: ExchangeDtype, is_compiled: bool = False
) -> None:
    """Keep this worker's experts of each layer alone, and reach the others through the group.

    Args:
        model: whole, the same on all workers of the group; changed in place.
        workers: of the group; at most as many as experts.
        exchange_dtype: of partial sums and gradients.
        is_compiled: compile what the experts compute.
    """
    division = ExpertDivision(model.config.num_experts, workers.num_workers)
    executors = []
    for layer_index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        experts = block.moe.experts
        assert isinstance(experts, GroupedExperts)
        local = build_experts(model.config, division.counts[workers.rank]).to(model.embedding.weight.device)
        start = division.starts[workers.rank]
        with torch.no_grad():
            for name, parameter in local.named_parameters():
                whole = experts.get_parameter(name)
                parameter.copy_(whole[start : start + local.num_experts])
                parameter.requires_grad_(whole.requires_grad)
        executors.append(ExpertParallelExperts(local, division, workers, exchange_dtype, layer_index, is_compiled))
    model.replace_experts(executors)


def global_shapes(model: MoETransformer) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return the shape of each parameter in the whole model, and the first of its elements that this worker has.

    Args:
        model: with or without divided experts.
    """
    # ZeRO 3 keeps the shape beside a parameter that is empty itself
    parameters = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in model.named_parameters()}
    shapes = {name: (tuple(shape), 0) for name, shape in parameters.items()}
    for layer_index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        experts = block.moe.experts
        if isinstance(experts, ExpertParallelExperts):
            for name, parameter in experts.named_parameters():
                shape = (experts.division.num_experts, *parameter.shape[1:])
                start = experts.first_expert * parameter[0].numel()
                shapes[f"blocks.{layer_index}.moe.experts.{name}"] = (shape, start)
    return shapes


def gather_model(model: MoETransformer, workers: ExpertGroup) -> MoETransformer | None:
    """Put the whole model together on the CPU of worker 0 of all; every worker must call it.

    Returns:
        the model on worker 0, else ``None``.
    """
    is_main, in_first_group = dist.get_rank() == 0, 0 in dist.get_process_group_ranks(workers.group)
    whole = empty_model(model) if is_main else None
    if not in_first_group:
        return None
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if is_routed_expert(name):
            value = _gather_experts(value, ExpertDivision(model.config.num_experts, workers.num_workers), workers)
        if whole is not None:
            whole.get_parameter(name).data = value.to("cpu", copy=True)
    return whole


def empty_model(model: MoETransformer) -> MoETransformer:
    """Return a model of the same config on the CPU whose parameters are to be filled, without drawing weights."""
    with torch.device("meta"):
        empty = MoETransformer(copy.deepcopy(model.config))
    empty.to_empty(device="cpu")
    return empty


def _gather_experts(part: Tensor, division: ExpertDivision, workers: ExpertGroup) -> Tensor:
    parts = []
    for rank, source in enumerate(dist.get_process_group_ranks(workers.group)):
        taken = part.contiguous() if rank == workers.rank else part.new_empty(division.counts[rank], *part.shape[1:])
        dist.broadcast(taken, source, group=workers.group)
        parts.append(taken)
    return torch.cat(parts)


def mark_for_group(model: nn.Module, group_name: str) -> None:
    """Mark divided parameters as DeepSpeed knows them: their gradients are averaged in a group of their own."""
    for name, parameter in model.named_parameters():
        if is_routed_expert(name):
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name  # type: ignore[attr-defined]
