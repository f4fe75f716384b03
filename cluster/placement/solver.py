"""From a problem to a placement: choose devices, share experts out, number them.

Both solvers are exact and deterministic: the same problem gives the same placement
on every machine. They balance the number of experts and know nothing of traffic.
"""

from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.selection import DeviceSelection, select_exactly, select_fewest
from cluster.placement.spread import spread_experts


def solve_placement(problem: PlacementProblem) -> Placement:
    """Place all experts on the fewest devices, spread evenly over those.

    Returns:
        A placement whose device 0 is the home; in each layer every device holds a run of
        consecutive expert ids, and the fullest device holds as few as is possible.
    Raises:
        PlacementError: the experts do not fit; the message says how much is missing.
    """
    return _spread(problem, select_fewest(problem))


def solve_spread(problem: PlacementProblem, num_devices: int) -> Placement:
    """Place all experts evenly on exactly ``num_devices`` devices, those with most room.

    Args:
        problem: the experts and the devices to choose from.
        num_devices: devices to use, from 1 to the number in the topology. With more devices than
            experts some hold none.
    Returns:
        A placement as from :func:`solve_placement`.
    Raises:
        PlacementError: there are not so many devices, or the experts do not fit on so few.
    """
    return _spread(problem, select_exactly(problem, num_devices))


def _spread(problem: PlacementProblem, selection: DeviceSelection) -> Placement:
    counts = spread_experts(selection.slots, problem.num_layers, problem.num_experts)
    device_of_expert = [
        [device_index for device_index, count in enumerate(layer_counts) for _ in range(count)]
        for layer_counts in counts
    ]
    names = [problem.topology.devices[index].name for index in selection.device_indices]
    return Placement.for_problem(problem, names, device_of_expert)
