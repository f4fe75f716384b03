"""A plan without the devices that were lost: only experts that have no copy left move, to where most room is."""

from collections.abc import Collection

from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from moe_bitnet.errors import PlacementError
from moe_bitnet.units import format_bytes


def evacuate(problem: PlacementProblem, placement: Placement, lost: Collection[str]) -> Placement:
    """Place the experts of lost devices on those that are left.

    Args:
        problem: what was placed.
        placement: in force until now.
        lost: names of devices; the home cannot be among them.
    Returns:
        A placement on the devices that are left, in their order; no expert that has a copy there has moved.
    Raises:
        PlacementError: the home is lost, or the others have no room; the message says how many bytes are missing.
    """
    names = [name for name in placement.device_names if name not in lost]
    if not names or names[0] != placement.device_names[0]:
        raise PlacementError(f"the home {placement.device_names[0]!r} cannot be left. Start again on other devices.")
    new_index = {placement.device_names.index(name): index for index, name in enumerate(names)}
    kept = [
        [[new_index[device] for device in copies if device in new_index] for copies in layer]
        for layer in placement.devices_of_expert
    ]
    free_bytes = _free_bytes(problem, names, kept)
    missing = sum(not copies for layer in kept for copies in layer)
    num_slots = sum(max(0, free) // problem.expert_bytes for free in free_bytes)
    if missing > num_slots:
        raise PlacementError(
            f"{missing} experts of {format_bytes(problem.expert_bytes)} have lost their only copy, and "
            f"{', '.join(names)} have room for {num_slots}: "
            f"{format_bytes((missing - num_slots) * problem.expert_bytes)} are missing. "
            f"Start the lost devices again, or add one."
        )
    for layer in kept:
        for copies in layer:
            if not copies:
                device = max(range(len(names)), key=lambda index: (free_bytes[index], -index))
                copies.append(device)
                free_bytes[device] -= problem.expert_bytes
    return Placement.for_problem(problem, names, kept)


def _free_bytes(problem: PlacementProblem, names: list[str], kept: list[list[list[int]]]) -> list[int]:
    free_bytes = [problem.topology.device(name).usable_bytes for name in names]
    free_bytes[0] -= problem.home_bytes
    for layer in kept:
        for copies in layer:
            for device in copies:
                free_bytes[device] -= problem.expert_bytes
    return free_bytes
