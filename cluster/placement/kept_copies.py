"""What of an old placement can stay when devices come, go or change: the first half of re-planning.

Devices that are still there stay in use, the home stays the home. Copies stay where they are as far as memory goes;
where a device has become too small, replicas leave before experts that have no other copy.
"""

from dataclasses import dataclass

import numpy as np

from cluster.placement.arrays import IntArray
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from moe_bitnet.errors import PlacementError
from moe_bitnet.units import format_bytes


@dataclass(frozen=True, eq=False)
class KeptCopies:
    """An old placement on new devices.

    Attributes:
        device_names: devices of the new placement, the home first.
        slots: experts that each can hold.
        copies: ``[num_layers][num_experts]`` devices that keep a copy; empty where an expert has none left.
    """

    device_names: tuple[str, ...]
    slots: tuple[int, ...]
    copies: list[list[list[int]]]

    def counts(self) -> IntArray:
        """Return ``[num_layers, num_devices]`` copies kept."""
        counts = np.zeros((len(self.copies), len(self.device_names)), dtype=np.int64)
        for layer_index, layer in enumerate(self.copies):
            for devices in layer:
                counts[layer_index, devices] += 1
        return counts


def keep_copies(problem: PlacementProblem, old: Placement, num_devices: int | None) -> KeptCopies:
    """Choose the devices of the new placement, and keep what fits.

    Args:
        problem: the same experts, on a topology that may have changed.
        old: in force until now.
        num_devices: devices to use; ``None`` for those of ``old`` that are still there, and as many more as memory
            needs.
    Raises:
        PlacementError: ``old`` is of another model, there are not so many devices, or they have no room.
    """
    if (old.num_layers, old.num_experts) != (problem.num_layers, problem.num_experts):
        raise PlacementError(
            f"the old placement has {old.num_layers} layers of {old.num_experts} experts, the model "
            f"{problem.num_layers} of {problem.num_experts}. Solve the placement anew."
        )
    names = _choose_devices(problem, old, num_devices)
    devices = {device.name: device for device in problem.topology.devices}
    slots = tuple(problem.slots_on(devices[name], is_home=name == names[0]) for name in names)
    new_index = {old.device_names.index(name): index for index, name in enumerate(names) if name in old.device_names}
    copies = [
        [[new_index[device] for device in devices_of_one if device in new_index] for devices_of_one in layer]
        for layer in old.devices_of_expert
    ]
    kept = KeptCopies(tuple(names), slots, copies)
    for device in range(len(names)):
        _evict(kept, device)
    return kept


def _choose_devices(problem: PlacementProblem, old: Placement, num_devices: int | None) -> list[str]:
    available = problem.topology.num_devices
    if num_devices is not None and (isinstance(num_devices, bool) or not 1 <= num_devices <= available):
        raise PlacementError(
            f"cannot use {num_devices!r} devices: the topology has {available}. Give a number from 1 to {available}."
        )
    devices = {device.name: device for device in problem.topology.devices}
    home = _choose_home(problem, old)
    num_held = {
        name: sum(len(old.expert_ids_on(index, layer)) for layer in range(old.num_layers))
        for index, name in enumerate(old.device_names)
    }
    # if there are too many, those that hold least are left
    left = sorted((name for name in num_held if name in devices and name != home), key=lambda name: -num_held[name])
    unused = sorted(
        (name for name in devices if name not in old.device_names and name != home),
        key=lambda name: -problem.slots_on(devices[name]),
    )

    def room(names: list[str]) -> int:
        return sum(problem.slots_on(devices[name], is_home=name == home) for name in names)

    chosen = [home, *left]
    if num_devices is not None:
        chosen = [*chosen, *unused][:num_devices]
    else:
        while room(chosen) < problem.total_experts and unused:
            chosen.append(unused.pop(0))
    if missing := max(0, problem.total_experts - room(chosen)):
        raise PlacementError(
            f"{problem.total_experts} experts of {format_bytes(problem.expert_bytes)} were placed; "
            f"{', '.join(chosen)} have room for {room(chosen)}: {format_bytes(missing * problem.expert_bytes)} are "
            f"missing. Add devices, or let more of them be used."
        )
    # in the old order, so that a placement that need not change does not
    order = {name: index for index, name in enumerate(old.device_names)}
    return [home, *sorted(chosen[1:], key=lambda name: order.get(name, len(order)))]


def _choose_home(problem: PlacementProblem, old: Placement) -> str:
    """Keep the home if it can be; else the roomiest device of the old placement, else of all."""
    fitting = {device.name: device for device in problem.topology.devices if device.usable_bytes >= problem.home_bytes}
    if not fitting:
        raise PlacementError(
            f"the part of the model that is not routed experts needs {format_bytes(problem.home_bytes)}; no device "
            f"offers as much. Use a larger device, or reserve less of it."
        )
    if old.device_names[0] in fitting:
        return old.device_names[0]
    known = [name for name in old.device_names if name in fitting]
    return max(known or fitting, key=lambda name: fitting[name].usable_bytes)


def _evict(kept: KeptCopies, device: int) -> None:
    """Remove copies from a device until it holds no more than its slots: replicas first, from the fullest layers."""
    counts = kept.counts()[:, device]
    for only_replicas in (True, False):
        for _ in range(int(counts.sum()) - kept.slots[device]):
            evictable = [
                (int(counts[layer_index]), -layer_index, expert_id)
                for layer_index, layer in enumerate(kept.copies)
                for expert_id, devices in enumerate(layer)
                if device in devices and (len(devices) > 1 or not only_replicas)
            ]
            if not evictable:
                break
            _, negative_layer, expert_id = max(evictable)
            kept.copies[-negative_layer][expert_id].remove(device)
            counts[-negative_layer] -= 1
