"""Copies of hot experts, of one layer, in the room that is left.

Two kinds, in this order:

- against overload, before the layer is placed: the expert with most load for each copy gets another one, until no
  copy carries more than half a device's share. Copies are placed like experts of their own, each with its share of
  the tokens, but not at home, where one copy would draw all tokens; two that land on one device are one again.
- against traffic, afterwards: an expert is copied to where many tokens go that visit its device for its
  sake alone, the home above all. A round of copies stays if the cost of a replay, overload included, falls.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from cluster.placement.arrays import FloatArray, IntArray
from cluster.placement.layer_problem import LayerProblem
from cluster.placement.replica_choice import HOME
from cluster.placement.traffic import route, visits_of_devices

Copies = list[list[int]]
"""For each expert of a layer the devices that hold it."""

LARGEST_SHARE = 0.5
"""Of a device's mean load that one copy should carry: larger pieces do not pack evenly."""
_MAX_ROUNDS = 32


@dataclass(frozen=True, eq=False)
class SplitLayer:
    """A layer whose hot experts were replaced by several with a part of the tokens each.

    Attributes:
        problem: of all copies.
        expert_of_copy: ``[num_copies]`` expert ids, ascending.
    """

    problem: LayerProblem
    expert_of_copy: IntArray

    def fold(self, device_of_copy: IntArray) -> Copies:
        """Return the devices of every expert from the device of every copy."""
        copies: Copies = [[] for _ in range(int(self.expert_of_copy[-1]) + 1)]
        for expert_id, device in zip(self.expert_of_copy.tolist(), device_of_copy.tolist(), strict=True):
            if device not in copies[expert_id]:
                copies[expert_id].append(device)
        return copies


def split_hot_experts(problem: LayerProblem) -> SplitLayer:
    """Give experts that carry more than ``LARGEST_SHARE`` of a device several copies, as room permits."""
    num_copies = _count_copies(problem)
    expert_of_copy = np.repeat(np.arange(problem.num_experts), num_copies)
    first_copy = np.cumsum(num_copies) - num_copies
    choices = problem.expert_indices.astype(np.int64)
    turn = np.arange(len(choices))[:, None] + choices  # tokens take the copies in turn
    copy_indices = first_copy[choices] + turn % num_copies[choices]
    expert_costs = problem.expert_costs[expert_of_copy]
    expert_costs[(num_copies > 1)[expert_of_copy], HOME] += problem.overload_cost * problem.expert_loads.sum()
    split = replace(
        problem,
        expert_indices=copy_indices,
        expert_loads=(problem.expert_loads / num_copies)[expert_of_copy],
        expert_costs=expert_costs,
    )
    return SplitLayer(split, expert_of_copy)


def add_copies_against_traffic(problem: LayerProblem, copies: Copies) -> Copies:
    """Add copies that keep tokens from visiting a device for one expert's sake.

    Args:
        problem: the layer.
        copies: the devices of every expert; what ``max_counts`` leave beside them is filled.
    Returns:
        ``copies`` with more devices at the ends of some lists; never dearer in a replay of the sample.
    """
    used = np.bincount([device for devices in copies for device in devices], minlength=problem.num_devices)
    room: IntArray = problem.max_counts - used
    devices = route(copies, problem.expert_indices, problem.num_devices)
    cost, num_wanted = replay_cost(problem, devices), max(1, int((room > 0).sum()))
    refused: set[tuple[int, int]] = set()
    for _ in range(_MAX_ROUNDS):
        chosen = _best_copies(problem, copies, devices, room, num_wanted, refused)
        if not chosen:
            break
        candidate = [list(devices_of_one) for devices_of_one in copies]
        for expert_id, device in chosen:
            candidate[expert_id].append(device)
        devices_then = route(candidate, problem.expert_indices, problem.num_devices)
        cost_then = replay_cost(problem, devices_then)
        if cost_then < cost:
            copies, devices, cost, num_wanted = candidate, devices_then, cost_then, 2 * num_wanted
            room -= np.bincount([device for _, device in chosen], minlength=problem.num_devices)
        elif len(chosen) == 1:
            refused.add(chosen[0])
        else:
            num_wanted = max(1, len(chosen) // 4)
    return copies


def _count_copies(problem: LayerProblem) -> IntArray:
    num_copies = np.ones(problem.num_experts, dtype=np.int64)
    room = int(problem.max_counts.sum()) - problem.num_experts
    largest = LARGEST_SHARE * problem.expert_loads.sum() / problem.num_devices
    while room > 0:
        share = np.where(num_copies < problem.num_devices - 1, problem.expert_loads / num_copies, 0.0)
        hottest = int(share.argmax())
        if share[hottest] <= largest:
            break
        num_copies[hottest] += 1
        room -= 1
    return num_copies


def replay_cost(problem: LayerProblem, devices: IntArray) -> float:
    """Return visits and overload of a replay, as in :func:`cluster.placement.layer_problem.layer_cost`.

    Args:
        problem: the layer.
        devices: ``[num_tokens, top_k]`` device of every pair.
    """
    overload = np.maximum(0.0, _loads(problem, devices) - problem.load_cap).sum()
    visits = visits_of_devices(devices, problem.num_devices)
    return float(visits @ problem.visit_costs + problem.overload_cost * overload)


def _loads(problem: LayerProblem, devices: IntArray) -> FloatArray:
    """Return ``[num_devices]`` loads; pairs are weighted so that an expert's load is that of the whole trace."""
    weights = _pair_weights(problem).ravel()
    return np.bincount(devices.ravel(), weights=weights, minlength=problem.num_devices).astype(np.float64)


def _pair_weights(problem: LayerProblem) -> FloatArray:
    in_sample = np.bincount(problem.expert_indices.ravel(), minlength=problem.num_experts)
    weights: FloatArray = (problem.expert_loads / np.maximum(in_sample, 1))[problem.expert_indices]
    return weights


def _best_copies(
    problem: LayerProblem,
    copies: Copies,
    devices: IntArray,
    room: IntArray,
    num_wanted: int,
    refused: Collection[tuple[int, int]],
) -> list[tuple[int, int]]:
    """Return up to ``num_wanted`` new (expert, device), of different experts, with the most visits to save."""
    saved, moved = _savings(problem, devices)
    loads = _loads(problem, devices)
    for expert_id, devices_of_one in enumerate(copies):
        saved[expert_id, devices_of_one] = 0.0
    for expert_id, device in refused:
        saved[expert_id, device] = 0.0
    room, taken = room.copy(), set[int]()
    chosen: list[tuple[int, int]] = []
    for position in np.argsort(-saved, axis=None, kind="stable").tolist():
        expert_id, device = divmod(position, problem.num_devices)
        if saved[expert_id, device] <= 0.0 or len(chosen) == num_wanted:
            break
        load_then = loads[device] + moved[expert_id, device]
        if room[device] > 0 and expert_id not in taken and load_then <= problem.load_cap:
            chosen.append((expert_id, device))
            taken.add(expert_id)
            room[device] -= 1
            loads[device] = load_then
    return chosen


def _savings(problem: LayerProblem, devices: IntArray) -> tuple[FloatArray, FloatArray]:
    """Estimate, for a copy of each expert on each device, the visits saved and the load moved there.

    Returns:
        both ``[num_experts, num_devices]``.
    """
    num_tokens, num_devices = len(devices), problem.num_devices
    choices = problem.expert_indices.astype(np.int64)
    tokens = np.arange(num_tokens)[:, None]
    on_device = np.bincount((tokens * num_devices + devices).ravel(), minlength=num_tokens * num_devices)
    on_device = on_device.reshape(num_tokens, num_devices)
    is_alone = np.take_along_axis(on_device, devices, axis=1) == 1  # [T, K]: the visit is for this pair only
    visit_cost = np.where(is_alone, problem.visit_costs[devices], 0.0)
    load = _pair_weights(problem)
    saved = np.zeros((problem.num_experts, num_devices))
    moved = np.zeros((problem.num_experts, num_devices))
    for device in range(num_devices):
        # a copy at home draws all pairs of the expert, elsewhere those that have no better device
        goes_there = (
            np.ones(devices.shape, dtype=bool) if device == HOME else is_alone & (on_device[:, device] > 0)[:, None]
        )
        goes_there = goes_there & (devices != device)
        saved[:, device] = np.bincount(
            choices[goes_there], weights=visit_cost[goes_there], minlength=problem.num_experts
        )
        moved[:, device] = np.bincount(choices[goes_there], weights=load[goes_there], minlength=problem.num_experts)
    return saved, moved
