"""From a problem to a placement: choose devices, share experts out, number them.

The solver is exact and deterministic: the same problem gives the same placement
on every machine. It balances the number of experts and knows nothing of traffic.
"""

from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.selection import DeviceSelection, select_exactly, select_fewest
from cluster.placement.spread import spread_experts


def solve_placement(problem: PlacementProblem, *, num_devices: int | None = None) -> Placement:
    """Place all experts on the fewest devices, or on a given number, spread evenly over those.

    Args:
        problem: the experts and the devices to choose from.
        num_devices: devices to use, those with most room, from 1 to the number in the topology; ``None`` for the
            fewest. With more devices than experts some hold none.
    Returns:
        A placement whose device 0 is the home; in each layer every device holds a run of
        consecutive expert ids, and the fullest device holds as few as is possible.
    Raises:
        PlacementError: the experts do not fit, or there are not so many devices; the message says what is missing.
    """
    return _spread(problem, select_fewest(problem) if num_devices is None else select_exactly(problem, num_devices))


def _spread(problem: PlacementProblem, selection: DeviceSelection) -> Placement:
    counts = spread_experts(selection.slots, problem.num_layers, problem.num_experts)
    devices_of_expert = [
        [device_index for device_index, count in enumerate(layer_counts) for _ in range(count)]
        for layer_counts in counts
    ]
    names = [problem.topology.devices[index].name for index in selection.device_indices]
    return Placement.for_problem(problem, names, devices_of_expert)
