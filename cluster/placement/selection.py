"""Which devices to use, and which of them is the home.

All experts of a model are equal, so a device is worth the number of whole experts it
holds, its slots. The home device loses slots to the home part, and by rounding the
loss can differ by one between devices, so every size of home is tried. For a given
home, the k - 1 others with most slots are the best set of k devices; some device is
home in any answer; so the best over all homes is the true minimum.
"""

from dataclasses import dataclass
from itertools import accumulate

from cluster.placement.problem import PlacementProblem
from moe_bitnet.errors import PlacementError
from moe_bitnet.units import format_bytes


@dataclass(frozen=True)
class DeviceSelection:
    """Chosen devices, the home first.

    Attributes:
        device_indices: positions in the problem's topology.
        slots: experts that each of them can hold, in the same order.
    """

    device_indices: tuple[int, ...]
    slots: tuple[int, ...]

    def first(self, count: int) -> "DeviceSelection":
        """Return the first ``count`` devices."""
        return DeviceSelection(self.device_indices[:count], self.slots[:count])


def select_fewest(problem: PlacementProblem) -> DeviceSelection:
    """Choose the fewest devices that hold all experts and the home part.

    Among equally few the set with most slots wins, then the one with the larger home, then the
    order of the topology.

    Raises:
        PlacementError: the devices are too small or too few; the message says by how much.
    """
    _check_largest_device(problem)
    candidates = [_shortest_prefix(order, problem.total_experts) for order in _orders(problem)]
    fitting = [selection for selection in candidates if selection is not None]
    if not fitting:
        raise _too_few_devices(problem)
    return min(fitting, key=lambda selection: (len(selection.slots), -sum(selection.slots)))


def select_exactly(problem: PlacementProblem, num_devices: int) -> DeviceSelection:
    """Choose ``num_devices`` devices with as many slots as possible.

    Raises:
        PlacementError: the topology has fewer devices, or the experts do not fit on so few.
    """
    available = problem.topology.num_devices
    if isinstance(num_devices, bool) or not isinstance(num_devices, int) or not 1 <= num_devices <= available:
        raise PlacementError(
            f"cannot spread over {num_devices!r} devices: the topology has {available}. "
            f"Give a number from 1 to {available}, or add devices."
        )
    needed = len(select_fewest(problem).slots)
    if num_devices < needed:
        raise PlacementError(
            f"{problem.total_experts} experts of {format_bytes(problem.expert_bytes)} and "
            f"{format_bytes(problem.home_bytes)} at home do not fit on {num_devices} of the {available} devices. "
            f"Use at least {needed}."
        )
    return max((order.first(num_devices) for order in _orders(problem)), key=lambda selection: sum(selection.slots))


def _orders(problem: PlacementProblem) -> list[DeviceSelection]:
    """For every size of home that can be: that home, then all other devices by falling slots."""
    devices = problem.topology.devices
    first_of_size: dict[int, int] = {}
    for index, device in enumerate(devices):
        first_of_size.setdefault(device.usable_bytes, index)
    by_slots = sorted(range(len(devices)), key=lambda index: (-problem.slots_on(devices[index]), index))
    orders = []
    for usable_bytes, home in sorted(first_of_size.items(), reverse=True):
        if usable_bytes >= problem.home_bytes:
            others = [index for index in by_slots if index != home]
            slots = [problem.slots_on(devices[home], is_home=True), *(problem.slots_on(devices[i]) for i in others)]
            orders.append(DeviceSelection((home, *others), tuple(slots)))
    return orders


def _shortest_prefix(order: DeviceSelection, total_experts: int) -> DeviceSelection | None:
    for count, num_slots in enumerate(accumulate(order.slots), start=1):
        if num_slots >= total_experts:
            return order.first(count)
    return None


def _check_largest_device(problem: PlacementProblem) -> None:
    largest = max(problem.topology.devices, key=lambda device: device.usable_bytes)
    for what, needed_bytes in (
        ("one expert needs", problem.expert_bytes),
        ("the part of the model that is not routed experts needs", problem.home_bytes),
    ):
        if needed_bytes > largest.usable_bytes:
            raise PlacementError(
                f"{what} {format_bytes(needed_bytes)}, the largest device {largest.name!r} offers "
                f"{format_bytes(largest.usable_bytes)}; {format_bytes(needed_bytes - largest.usable_bytes)} are "
                f"missing. Use a larger device, or reserve less of it."
            )


def _too_few_devices(problem: PlacementProblem) -> PlacementError:
    num_slots = max(sum(order.slots) for order in _orders(problem))
    missing = problem.total_experts - num_slots
    largest = max(problem.topology.devices, key=lambda device: device.usable_bytes)
    more_devices = -(-missing // problem.slots_on(largest))
    return PlacementError(
        f"{problem.total_experts} experts of {format_bytes(problem.expert_bytes)} were given; "
        f"{problem.topology.num_devices} devices have room for {num_slots} beside {format_bytes(problem.home_bytes)} "
        f"at home; {missing} experts, {format_bytes(missing * problem.expert_bytes)}, have no place. The model needs "
        f"{more_devices} more devices of {format_bytes(largest.usable_bytes)} usable memory, like {largest.name!r}."
    )
