"""Places one layer: exactly if it has few experts, else by clustering and local search."""

import numpy as np

from cluster.placement.arrays import IntArray
from cluster.placement.exact_search import MAX_EXPERTS, num_steps, solve_layer_exactly
from cluster.placement.layer_problem import LayerProblem, layer_cost
from cluster.placement.layer_start import cluster_greedily
from cluster.placement.local_search import improve_layer

_EXACT_STEPS = 4 * 10**9
"""Of all layers together, about 3 ns each: ten seconds."""

_EXPERT_SHAKES = 50_000
"""Shakes of all layers together, times the experts of a layer: about five seconds for 256 experts on 32 devices."""
_FEWEST_SHAKES, _MOST_SHAKES = 2, 100


def solve_layer(problem: LayerProblem, num_layers: int, generator: np.random.Generator) -> IntArray:
    """Return ``[num_experts]`` device indices within ``max_counts``, as cheap as can be found.

    Args:
        problem: the layer.
        num_layers: of the model; the more there are, the less effort is spent on each.
        generator: of random numbers; the same one gives the same placement.
    """
    if problem.num_devices == 1:
        return np.zeros(problem.num_experts, dtype=np.int64)
    if problem.num_experts <= MAX_EXPERTS and num_layers * num_steps(problem) <= _EXACT_STEPS:
        return solve_layer_exactly(problem)
    num_shakes = min(_MOST_SHAKES, max(_FEWEST_SHAKES, _EXPERT_SHAKES // (num_layers * problem.num_experts)))
    clustered = improve_layer(problem, cluster_greedily(problem), num_shakes, generator)
    # A dearer start may still end lower; it is tried once, without shakes.
    contiguous = improve_layer(problem, contiguous_start(problem), 0, generator)
    return min(clustered, contiguous, key=lambda devices: layer_cost(problem, devices))


def contiguous_start(problem: LayerProblem) -> IntArray:
    """Return consecutive expert ids on each device, as even as ``max_counts`` permit."""
    counts = np.zeros(problem.num_devices, dtype=np.int64)
    for _ in range(problem.num_experts):
        counts[np.where(counts < problem.max_counts, counts, problem.num_experts).argmin()] += 1
    return np.repeat(np.arange(problem.num_devices), counts)
