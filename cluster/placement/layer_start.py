"""A first placement of one layer: experts that are visited together on one device, loads even.

Devices are filled one after another. Each begins with the hottest expert that is left and takes the one most
visited together with what it holds, until it has its share of the load that is left. How strongly two
experts belong together is the number of tokens they share over the geometric mean of their loads.
"""

import numpy as np

from cluster.placement.arrays import BoolArray, FloatArray, IntArray
from cluster.placement.layer_problem import LayerProblem


def cluster_greedily(problem: LayerProblem) -> IntArray:
    """Return ``[num_experts]`` device indices within ``max_counts``."""
    affinity = _affinity(problem)
    device_of_expert = np.full(problem.num_experts, -1)
    is_left = np.ones(problem.num_experts, dtype=bool)
    for device in range(problem.num_devices):
        room_later = int(problem.max_counts[device + 1 :].sum())
        share = problem.expert_loads[is_left].sum() / (problem.num_devices - device)
        for expert_id in _fill(problem, affinity, is_left, int(problem.max_counts[device]), room_later, share):
            device_of_expert[expert_id] = device
            is_left[expert_id] = False
    assert not is_left.any()
    return device_of_expert


def _fill(
    problem: LayerProblem, affinity: FloatArray, is_left: BoolArray, room: int, room_later: int, share: float
) -> list[int]:
    """Choose the experts of one device.

    Args:
        problem: the layer.
        affinity: ``[E, E]``, how strongly two experts belong together.
        is_left: ``[E]``, which experts have no device yet.
        room: experts that the device holds.
        room_later: experts that the devices after it hold; what they cannot take goes here.
        share: load that the device should have.
    """
    chosen: list[int] = []
    is_free = is_left.copy()
    pull, load = np.zeros(problem.num_experts), 0.0
    while is_free.any() and len(chosen) < room:
        is_fitting = is_free & (load + problem.expert_loads <= share) if chosen else is_free
        if not is_fitting.any():
            if is_free.sum() <= room_later:
                break
            is_fitting = is_free
        score = pull if chosen else problem.expert_loads
        expert_id = int(np.where(is_fitting, score, -np.inf).argmax())
        chosen.append(expert_id)
        is_free[expert_id] = False
        pull = pull + affinity[expert_id]
        load += problem.expert_loads[expert_id]
    return chosen


def _affinity(problem: LayerProblem) -> FloatArray:
    choices, num_experts = problem.expert_indices.astype(np.int64), problem.num_experts
    pairs = (choices[:, :, None] * num_experts + choices[:, None, :]).ravel()
    shared = np.bincount(pairs, minlength=num_experts**2).reshape(num_experts, num_experts)
    loads = np.maximum(problem.expert_loads, 1.0)
    affinity: FloatArray = shared / np.sqrt(np.outer(loads, loads))
    return affinity
