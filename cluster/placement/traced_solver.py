"""Places all layers by a routing trace: least traffic under a load cap, then replicas in the room that is left.

Layers are independent once each has its share of the devices' memory: the even share of the experts, which always
fits, and an equal part of what is free beyond it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.placement.arrays import FloatArray, IntArray
from cluster.placement.layer_problem import LayerProblem
from cluster.placement.layer_solver import solve_layer
from cluster.placement.problem import PlacementProblem
from cluster.placement.replicas import Copies, add_copies_against_traffic, replay_cost, split_hot_experts
from cluster.placement.selection import DeviceSelection
from cluster.placement.spread import level_totals, spread_experts
from cluster.placement.traffic import route
from cluster.routing.trace import RoutingTrace

MAX_SAMPLE_TOKENS, MIN_SAMPLE_TOKENS = 8192, 4096
_TOTAL_SAMPLE_TOKENS = 8 * MAX_SAMPLE_TOKENS

_CHEAPEST_VISIT = 0.01
"""Of the dearest: even where bytes cost nothing, a visit is work."""


@dataclass(frozen=True)
class TraceGoal:
    """What the placement by a trace aims at.

    Attributes:
        max_imbalance: load of a device over the mean, at most, in every layer.
        with_replicas: whether free memory is used for copies.
        seed: of random numbers.
    """

    max_imbalance: float
    with_replicas: bool
    seed: int


def place_by_trace(
    problem: PlacementProblem,
    selection: DeviceSelection,
    trace: RoutingTrace,
    goal: TraceGoal,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Copies]:
    """Place every layer.

    Args:
        problem: the experts.
        selection: the devices, the home first; they suffice.
        trace: of the same model.
        goal: see there.
        on_progress: called with the number of layers done and of all.
    Returns:
        ``[num_layers][num_experts]`` lists of positions in the selection.
    """
    room = layer_rooms(selection.slots, problem.num_layers, problem.num_experts)
    visit_costs = link_costs(problem, [problem.topology.devices[index].name for index in selection.device_indices])
    generators = np.random.default_rng(goal.seed).spawn(problem.num_layers)
    layers = []
    for layer_index, generator in enumerate(generators):
        layer = layer_problem(trace, layer_index, room[layer_index], visit_costs, goal.max_imbalance)
        layers.append(_place_layer(layer, problem.num_layers, goal.with_replicas, generator))
        if on_progress is not None:
            on_progress(layer_index + 1, problem.num_layers)
    return layers


def layer_problem(
    trace: RoutingTrace,
    layer_index: int,
    room: IntArray,
    visit_costs: FloatArray,
    max_imbalance: float,
    expert_costs: FloatArray | None = None,
) -> LayerProblem:
    """Make the problem of one layer: visits from a sample of the trace, loads from all of it.

    Args:
        trace: of all layers.
        layer_index: the layer.
        room: ``[num_devices]`` experts that each device can hold.
        visit_costs: ``[num_devices]``, 0 for the home.
        max_imbalance: load of a device over the mean, at most.
        expert_costs: ``[num_experts, num_devices]``; none by default.
    """
    wanted = max(MIN_SAMPLE_TOKENS, min(MAX_SAMPLE_TOKENS, _TOTAL_SAMPLE_TOKENS // trace.num_layers))
    num_sampled = min(trace.num_tokens, wanted)
    # in equal steps through the trace, so that each part of the run is seen
    sampled = np.arange(num_sampled) * trace.num_tokens // num_sampled
    loads = trace.tokens_per_expert(layer_index).astype(np.float64) * (num_sampled / trace.num_tokens)
    return LayerProblem(
        expert_indices=trace.layer(layer_index)[sampled],
        expert_loads=loads,
        max_counts=room,
        visit_costs=visit_costs,
        load_cap=max_imbalance * float(loads.sum()) / len(room),
        expert_costs=np.zeros((trace.num_experts, len(room))) if expert_costs is None else expert_costs,
    )


def layer_rooms(slots: Sequence[int], num_layers: int, num_experts: int) -> IntArray:
    """Share the devices' slots out to the layers.

    Returns:
        ``[num_layers, num_devices]`` experts; a column sums to at most its slots, a row to at least ``num_experts``.
    """
    rooms: IntArray = np.array(spread_experts(slots, num_layers, num_experts))
    for device, num_slots in enumerate(slots):
        free = num_slots - int(rooms[:, device].sum())
        rooms[:, device] += free // num_layers
        rooms[: free % num_layers, device] += 1
    fitting: IntArray = np.minimum(rooms, num_experts)
    return fitting


def link_costs(problem: PlacementProblem, names: Sequence[str]) -> FloatArray:
    """Return what a visit costs on each device: seconds for a byte there and back, over those of the slowest link.

    Args:
        problem: gives the topology.
        names: of the devices, the home first.
    Returns:
        ``[num_devices]``: 0 for the home, else above 0 to 1; all 1 if a link with the home is not known.
    """
    home, *others = names
    costs = np.ones(len(names))
    costs[0] = 0.0
    ways = [(problem.topology.link(home, name), problem.topology.link(name, home)) for name in others]
    seconds = [
        1 / there.bandwidth_bytes_per_s + 1 / back.bandwidth_bytes_per_s
        for there, back in ways
        if there is not None and back is not None
    ]
    if len(seconds) == len(others) and max(seconds, default=0.0) > 0.0:
        costs[1:] = np.maximum(np.array(seconds) / max(seconds), _CHEAPEST_VISIT)
    return costs


def _place_layer(problem: LayerProblem, num_layers: int, with_replicas: bool, generator: np.random.Generator) -> Copies:
    if not with_replicas:
        return _single_copies(solve_layer(problem, num_layers, generator))
    # Whether memory is better spent on uneven numbers of experts, on copies of hot ones or on copies that save
    # visits, the searches cannot see, as which copy a token takes depends on its other experts: a replay decides.
    even = replace(problem, max_counts=np.array(level_totals(problem.max_counts.tolist(), problem.num_experts)))
    candidates = [_single_copies(solve_layer(each, num_layers, generator)) for each in (problem, even)]
    split = split_hot_experts(problem)
    if len(split.expert_of_copy) > problem.num_experts:
        candidates.append(split.fold(solve_layer(split.problem, num_layers, generator)))
    finished = [add_copies_against_traffic(problem, copies) for copies in candidates]
    return min(
        finished, key=lambda copies: replay_cost(problem, route(copies, problem.expert_indices, problem.num_devices))
    )


def _single_copies(device_of_expert: IntArray) -> Copies:
    return [[device] for device in device_of_expert.tolist()]
