"""From a problem to a placement: choose devices, share experts out, and by a trace choose which go together.

    fewest devices  ──►  least traffic under a load cap  ──►  replicas of hot experts in the free memory
      (selection)          (traced_solver, with a trace)        (replicas, if asked for)

Deterministic: the same arguments give the same placement. Without a trace the solver balances the number of experts
and knows nothing of traffic. What an answer is worth says :mod:`cluster.placement.report`.
"""

import math
from collections.abc import Callable, Sequence

from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.selection import DeviceSelection, select_exactly, select_fewest
from cluster.placement.spread import spread_experts
from cluster.placement.traced_solver import TraceGoal, place_by_trace
from cluster.placement.traffic import check_trace
from cluster.routing.trace import RoutingTrace
from moe_bitnet.errors import ConfigError

DEFAULT_MAX_IMBALANCE = 1.15


def solve_placement(
    problem: PlacementProblem,
    *,
    trace: RoutingTrace | None = None,
    num_devices: int | None = None,
    max_imbalance: float = DEFAULT_MAX_IMBALANCE,
    with_replicas: bool = False,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Placement:
    """Place all experts on the fewest devices, or on a given number.

    Args:
        problem: the experts and the devices to choose from.
        trace: routing of this model; with it the placement has little traffic under the load cap.
        num_devices: devices to use, those with most room, from 1 to the number in the topology; ``None`` for the
            fewest. With more devices than experts some hold none.
        max_imbalance: with a trace, the load of a device over the mean of all, at most, in every layer. Where memory
            or one hot expert does not permit it, the placement comes as near as it can.
        with_replicas: with a trace, fill free memory with copies of experts that even out load or save traffic.
        seed: of random numbers, with a trace.
        on_progress: called after each layer with the number of layers done and of all, with a trace.
    Returns:
        A placement whose device 0 is the home. Without a trace every device holds, in each layer, a run of
        consecutive expert ids, and the fullest device as few as is possible.
    Raises:
        PlacementError: the experts do not fit, there are not so many devices, or the trace is of another model; the
            message says what is missing.
        ConfigError: ``max_imbalance`` is below 1, or replicas are asked for without a trace.
    """
    _check_goal(trace, max_imbalance, with_replicas)
    selection = select_fewest(problem) if num_devices is None else select_exactly(problem, num_devices)
    if trace is None:
        return _to_placement(problem, selection, _contiguous(problem, selection))
    check_trace(trace, problem.num_layers, problem.num_experts)
    goal = TraceGoal(float(max_imbalance), with_replicas, seed)
    return _to_placement(problem, selection, place_by_trace(problem, selection, trace, goal, on_progress))


def _contiguous(problem: PlacementProblem, selection: DeviceSelection) -> list[list[int]]:
    counts = spread_experts(selection.slots, problem.num_layers, problem.num_experts)
    return [
        [device_index for device_index, count in enumerate(layer_counts) for _ in range(count)]
        for layer_counts in counts
    ]


def _to_placement(
    problem: PlacementProblem,
    selection: DeviceSelection,
    devices_of_expert: Sequence[Sequence[int | Sequence[int]]],
) -> Placement:
    names = [problem.topology.devices[index].name for index in selection.device_indices]
    return Placement.for_problem(problem, names, devices_of_expert)


def _check_goal(trace: RoutingTrace | None, max_imbalance: float, with_replicas: bool) -> None:
    is_number = isinstance(max_imbalance, int | float) and not isinstance(max_imbalance, bool)
    if not is_number or not 1 <= max_imbalance < math.inf:
        raise ConfigError(f"max_imbalance is {max_imbalance!r}; give a number of at least 1, which is even load.")
    if with_replicas and trace is None:
        raise ConfigError(
            "with_replicas is set without a trace: which experts are hot is not known. Record a trace, or make one "
            "with cluster.routing.synthetic."
        )
