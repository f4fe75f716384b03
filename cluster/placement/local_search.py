"""Improves the placement of one layer by moves and swaps, and shakes it when none helps.

A sweep visits the experts in random order and does for each the best move or swap, if it saves anything; sweeps
go on until one changes nothing. Then the experts of two devices are dealt anew, or a few experts swapped, or in a
small layer all dealt anew, at random, and it all goes again from the best placement so far (iterated local
search); one that is as good takes its place, so that the search drifts over plateaus.
The same generator gives the same placement; no clock is asked.
"""

import numpy as np

from cluster.placement.arrays import IntArray
from cluster.placement.layer_counts import LayerCounts
from cluster.placement.layer_problem import LayerProblem, layer_cost

_MIN_GAIN = 1e-6
"""Of one visit: what is less is rounding."""

_SMALL_LAYER = 32
"""Experts of a layer for which starting from nothing is cheap enough to be worth it."""


def improve_layer(problem: LayerProblem, start: IntArray, num_shakes: int, generator: np.random.Generator) -> IntArray:
    """Return a placement that costs at most as much as ``start``.

    Args:
        problem: the layer.
        start: ``[num_experts]`` device indices within ``max_counts``.
        num_shakes: how often to shake after the first descent.
        generator: chooses orders and shakes.
    Returns:
        ``[num_experts]`` device indices; no single move or swap makes them cheaper.
    """
    counts = LayerCounts(problem, start)
    _descend(counts, generator)
    best, best_cost = counts.device_of_expert.copy(), layer_cost(problem, counts.device_of_expert)
    shakes = [_deal_two_devices, _swap_some, *([_deal_all] if problem.num_experts <= _SMALL_LAYER else [])]
    for shake in range(num_shakes if problem.num_devices > 1 else 0):
        counts.place(shakes[shake % len(shakes)](best, problem, generator))
        _descend(counts, generator)
        cost = layer_cost(problem, counts.device_of_expert)
        if cost <= best_cost + _MIN_GAIN:
            best, best_cost = counts.device_of_expert.copy(), cost
    return best


def _descend(counts: LayerCounts, generator: np.random.Generator) -> None:
    """Sweep until a whole sweep changes nothing; every change saves cost, so that there is an end."""
    has_changed = True
    while has_changed:
        order = generator.permutation(counts.problem.num_experts).tolist()
        has_changed = sum(_improve(counts, expert_id) for expert_id in order) > 0


def _improve(counts: LayerCounts, expert_id: int) -> bool:
    """Do the best move or swap of one expert; returns whether any helped."""
    moves, swaps = counts.move_gains(expert_id), counts.swap_gains(expert_id)
    device, partner = int(moves.argmax()), int(swaps.argmax())
    if max(moves[device], swaps[partner]) <= _MIN_GAIN:
        return False
    if moves[device] >= swaps[partner]:
        counts.move(expert_id, device)
        return True
    source, target = int(counts.device_of_expert[expert_id]), int(counts.device_of_expert[partner])
    counts.move(expert_id, target)
    counts.move(partner, source)
    return True


def _deal_two_devices(placed: IntArray, problem: LayerProblem, generator: np.random.Generator) -> IntArray:
    """Deal the experts of two devices to the same two at random; each keeps its number."""
    first, second = generator.choice(problem.num_devices, 2, replace=False)
    pool = np.flatnonzero((placed == first) | (placed == second))
    shaken = placed.copy()
    shaken[pool] = generator.permutation(placed[pool])
    return shaken


def _deal_all(placed: IntArray, problem: LayerProblem, generator: np.random.Generator) -> IntArray:
    """Deal all experts anew; each device keeps its number."""
    return generator.permutation(placed)


def _swap_some(placed: IntArray, problem: LayerProblem, generator: np.random.Generator) -> IntArray:
    """Swap about a tenth of the experts, in random pairs."""
    num_chosen = min(problem.num_experts, 4 + problem.num_experts // 10)
    chosen = generator.choice(problem.num_experts, num_chosen, replace=False)
    shaken = placed.copy()
    shaken[chosen] = placed[np.roll(chosen, 1)]
    return shaken
