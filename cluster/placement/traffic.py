"""What a placement does with a routing: visits, pairs away from home and balance, by replay.

The choice between copies is that of :mod:`cluster.placement.replica_choice`, made block after block of
tokens, with the loads that the blocks before have left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.placement.arrays import FloatArray, IntArray
from cluster.placement.placement import Placement
from cluster.placement.replica_choice import HOME, ReplicaTable
from cluster.routing.trace import RoutingTrace
from moe_bitnet.errors import PlacementError

_BLOCK_TOKENS = 256


@dataclass(frozen=True)
class LayerTraffic:
    """Of one layer, on average over the tokens of a trace.

    Attributes:
        visits_per_token: distinct devices other than the home that a token visits: rows that leave home.
        pairs_per_token: (token, expert) pairs of a token whose expert is used away from home.
        imbalance: load of the most loaded device over the mean of all; 1 is even.
        hottest_expert: load of the hottest expert over the mean of a device: without replicas no placement
            has a lower imbalance.
    """

    visits_per_token: float
    pairs_per_token: float
    imbalance: float
    hottest_expert: float


def measure_placement(placement: Placement, trace: RoutingTrace) -> tuple[LayerTraffic, ...]:
    """Replay a trace on a placement, layer by layer.

    Raises:
        PlacementError: the trace is of another model.
    """
    check_trace(trace, placement.num_layers, placement.num_experts)
    return tuple(
        measure_layer(copies, trace.layer(layer_index), placement.num_devices)
        for layer_index, copies in enumerate(placement.devices_of_expert)
    )


def measure_layer(copies: Sequence[Sequence[int]], expert_indices: IntArray, num_devices: int) -> LayerTraffic:
    """Replay the routing ``[num_tokens, top_k]`` of one layer, all devices being up."""
    devices = route(copies, expert_indices, num_devices)
    loads = np.bincount(devices.ravel(), minlength=num_devices)
    expert_loads = np.bincount(expert_indices.ravel(), minlength=len(copies))
    num_tokens = len(devices)
    return LayerTraffic(
        visits_per_token=float(visits_of_devices(devices, num_devices)[1:].sum() / num_tokens),
        pairs_per_token=float(np.count_nonzero(devices != HOME) / num_tokens),
        imbalance=float(loads.max() / loads.mean()),
        hottest_expert=float(expert_loads.max() / loads.mean()),
    )


def route(copies: Sequence[Sequence[int]], expert_indices: IntArray, num_devices: int) -> IntArray:
    """Return the device ``[num_tokens, top_k]`` of every pair, all devices being up."""
    table, is_up = ReplicaTable(copies, num_devices), np.ones(num_devices, dtype=bool)
    if all(len(devices) == 1 for devices in copies):
        return table.choose(expert_indices, is_up)
    loads: FloatArray = np.zeros(num_devices)
    blocks = []
    for start in range(0, len(expert_indices), _BLOCK_TOKENS):
        blocks.append(table.choose(expert_indices[start : start + _BLOCK_TOKENS], is_up, loads))
        loads += np.bincount(blocks[-1].ravel(), minlength=num_devices)
    return np.concatenate(blocks)


def visits_of_devices(devices: IntArray, num_devices: int) -> IntArray:
    """Count the tokens that visit each device, ``[num_devices]``; a token counts once.

    Args:
        devices: ``[num_tokens, top_k]`` device of every pair.
        num_devices: D.
    """
    visited = np.zeros((len(devices), num_devices), dtype=bool)
    visited[np.arange(len(devices))[:, None], devices] = True
    visits: IntArray = visited.sum(axis=0)
    return visits


def check_trace(trace: RoutingTrace, num_layers: int, num_experts: int) -> None:
    """Check that a trace is of a model with these sizes.

    Raises:
        PlacementError: it is not.
    """
    if (trace.num_layers, trace.num_experts) != (num_layers, num_experts):
        raise PlacementError(
            f"the routing trace has {trace.num_layers} layers of {trace.num_experts} experts, the model {num_layers} "
            f"of {num_experts}. Record a trace of this model."
        )
