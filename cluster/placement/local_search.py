"""Improves the placement of one layer by moves and swaps, and shakes it when none helps.

A sweep visits experts in random order and does for each the best move or swap, if it saves anything; sweeps go on
until one changes nothing. Then the experts of two devices are dealt anew, or a few experts swapped, or in a
small layer all dealt anew, at random, and it all goes again from the best placement so far (iterated local
search); one that is as good takes its place, so that the search drifts over plateaus. After a shake only
experts on devices that changed are visited, until they have come to rest; every expert gets its
turn again at the end.

The same generator gives the same placement; no clock is asked.
"""

from collections.abc import Collection

import numpy as np

from cluster.placement.arrays import IntArray
from cluster.placement.layer_counts import LayerCounts
from cluster.placement.layer_problem import LayerProblem

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
    everywhere = range(problem.num_devices)
    _settle(counts, everywhere, generator)
    best, best_cost = counts.device_of_expert.copy(), counts.cost()
    shakes = [_deal_two_devices, _swap_some, *([_deal_all] if problem.num_experts <= _SMALL_LAYER else [])]
    for shake in range(num_shakes if problem.num_devices > 1 else 0):
        shaken = shakes[shake % len(shakes)](best, problem, generator)
        moved = np.flatnonzero(shaken != counts.device_of_expert)
        touched = {*counts.device_of_expert[moved].tolist(), *shaken[moved].tolist()}
        counts.place(shaken)
        _settle(counts, touched, generator)
        if counts.cost() <= best_cost + _MIN_GAIN:
            best, best_cost = counts.device_of_expert.copy(), counts.cost()
    counts.place(best)
    _settle(counts, everywhere, generator)
    return counts.device_of_expert


def _settle(counts: LayerCounts, devices: Collection[int], generator: np.random.Generator) -> None:
    """Improve the experts on some devices, and on those that this changes, until nothing more helps them.

    Every change saves cost, so that there is an end.
    """
    changed = set(devices)
    while changed:
        experts = np.flatnonzero(np.isin(counts.device_of_expert, list(changed)))
        changed = set()
        for expert_id in generator.permutation(experts).tolist():
            changed |= _improve(counts, expert_id)


def _improve(counts: LayerCounts, expert_id: int) -> set[int]:
    """Do the best move or swap of one expert; returns the devices that it changed."""
    moves, swaps = counts.move_gains(expert_id), counts.swap_gains(expert_id)
    device, partner = int(moves.argmax()), int(swaps.argmax())
    if max(moves[device], swaps[partner]) <= _MIN_GAIN:
        return set()
    source = int(counts.device_of_expert[expert_id])
    if moves[device] >= swaps[partner]:
        counts.move(expert_id, device)
        return {source, device}
    target = int(counts.device_of_expert[partner])
    counts.move(expert_id, target)
    counts.move(partner, source)
    return {source, target}


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
