"""The cheapest placement of one layer with few experts, for certain: a search over sets of experts.

A set of experts is a bit mask. The cost is a sum over devices, so with ``cost_d(S)`` of the set S on device d

    best_0(S) = cost_0(S)        best_d(S) = min over R within S of best_(d-1)(S without R) + cost_d(R)

and the answer is best of the last device for all experts. There are 3^E pairs of a set and a subset of it; they are
walked in two halves of the bits, the outer one in Python, the inner one in numpy.
"""

import numpy as np

from cluster.placement.arrays import FloatArray, IntArray
from cluster.placement.layer_problem import LayerProblem

MAX_EXPERTS = 16


def num_steps(problem: LayerProblem) -> int:
    """Return the pairs of sets that :func:`solve_layer_exactly` looks at, about 10 ns each."""
    return max(1, problem.num_devices - 2) * int(3**problem.num_experts)


def solve_layer_exactly(problem: LayerProblem) -> IntArray:
    """Return the cheapest ``[num_experts]`` device indices within ``max_counts``.

    Args:
        problem: a layer of at most ``MAX_EXPERTS`` experts.
    """
    assert problem.num_experts <= MAX_EXPERTS, problem.num_experts
    costs = _set_costs(problem)
    best = [costs[0]]
    for device in range(1, problem.num_devices - 1):
        best.append(_add_device(best[-1], costs[device], problem.num_experts))
    remaining = (1 << problem.num_experts) - 1
    device_of_expert = np.zeros(problem.num_experts, dtype=np.int64)
    for device in range(problem.num_devices - 1, 0, -1):
        subsets = _subsets(remaining)
        taken = int(subsets[np.argmin(best[device - 1][remaining ^ subsets] + costs[device][subsets])])
        device_of_expert[[bit for bit in range(problem.num_experts) if taken >> bit & 1]] = device
        remaining ^= taken
    return device_of_expert


def _set_costs(problem: LayerProblem) -> FloatArray:
    """Return ``[num_devices, 2^E]``: the cost of every set of experts on every device, inf if it has no room."""
    num_experts = problem.num_experts
    masks = np.arange(1 << num_experts)
    has_expert = masks[:, None] >> np.arange(num_experts) & 1  # [2^E, E]
    sizes, loads = has_expert.sum(axis=1), has_expert @ problem.expert_loads
    overload = problem.overload_cost * np.maximum(0.0, loads - problem.load_cap)
    visits = _visits_of_sets(problem)
    costs = np.empty((problem.num_devices, len(masks)))
    for device in range(problem.num_devices):
        on_device = has_expert @ problem.expert_costs[:, device]
        costs[device] = problem.visit_costs[device] * visits + on_device + overload
        costs[device, sizes > problem.max_counts[device]] = np.inf
    return costs


def _visits_of_sets(problem: LayerProblem) -> IntArray:
    """Return ``[2^E]``: the tokens with an expert in each set."""
    num_experts = problem.num_experts
    token_masks = (1 << problem.expert_indices.astype(np.int64)).sum(axis=1)
    num_within = np.bincount(token_masks, minlength=1 << num_experts)
    for bit in range(num_experts):  # from tokens with exactly this set to tokens within it, bit by bit
        halves = num_within.reshape(-1, 2, 1 << bit)
        halves[:, 1] += halves[:, 0]
    complement = np.arange(1 << num_experts) ^ ((1 << num_experts) - 1)
    visits: IntArray = len(token_masks) - num_within[complement]
    return visits


def _add_device(best: FloatArray, costs: FloatArray, num_experts: int) -> FloatArray:
    """Return the best cost of every set with one more device to put a part of it on."""
    low_bits = num_experts // 2
    low_sets = np.arange(1 << low_bits)
    subsets = [_subsets(int(mask)) for mask in low_sets]  # of each low half
    starts = np.cumsum([0, *map(len, subsets[:-1])])
    taken = np.concatenate(subsets)
    left = np.repeat(low_sets, [len(of_one) for of_one in subsets]) ^ taken
    best_rows, cost_rows = best.reshape(-1, 1 << low_bits), costs.reshape(-1, 1 << low_bits)
    result = np.full_like(best_rows, np.inf)
    for high in range(len(result)):
        for high_taken in _subsets(high).tolist():
            candidates = best_rows[high ^ high_taken][left] + cost_rows[high_taken][taken]
            np.minimum(result[high], np.minimum.reduceat(candidates, starts), out=result[high])
    return result.ravel()


def _subsets(mask: int) -> IntArray:
    """Return all subsets of a bit mask, ascending."""
    subsets = np.zeros(1, dtype=np.int64)
    for bit in range(mask.bit_length()):
        if mask >> bit & 1:
            subsets = np.concatenate([subsets, subsets | (1 << bit)])
    return subsets
