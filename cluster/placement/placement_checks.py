"""The form of a placement, checked: names that exist, and for every expert distinct devices that exist."""

from collections.abc import Sequence
from typing import Any

from cluster.placement.problem import PlacementProblem
from moe_bitnet.errors import PlacementError


def check_devices(device_names: Sequence[Any], problem: PlacementProblem) -> None:
    """Check that every name is in the problem's topology, and given once.

    Raises:
        PlacementError: no name, an unknown one, or one given twice.
    """
    known = [device.name for device in problem.topology.devices]
    if not device_names:
        raise PlacementError("placement: it names no device. Name at least the home.")
    for position, name in enumerate(device_names):
        if name not in known:
            raise PlacementError(f"placement: device {name!r} is not in the topology, which has {', '.join(known)}.")
        if name in device_names[:position]:
            raise PlacementError(f"placement: device {name!r} is named twice. Name each device once.")


def copies_of_experts(
    devices_of_expert: Sequence[Sequence[Any]], num_devices: int, problem: PlacementProblem
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Check the devices of every expert, and return them as tuples.

    Args:
        devices_of_expert: ``[num_layers][num_experts]``; a device index, or a list or tuple of them.
        num_devices: indices must lie below it.
        problem: gives the number of layers and experts.
    Returns:
        ``[num_layers][num_experts]`` tuples of at least one device index.
    Raises:
        PlacementError: a wrong number of layers or experts, no device, a device that is not there, or one
            given twice for an expert.
    """
    if len(devices_of_expert) != problem.num_layers:
        raise PlacementError(
            f"placement: it places {len(devices_of_expert)} layers, the model has {problem.num_layers}. "
            f"Give one list for each layer that holds experts."
        )
    for layer_index, layer in enumerate(devices_of_expert):
        if len(layer) != problem.num_experts:
            raise PlacementError(
                f"placement: layer {layer_index} places {len(layer)} experts, the model has {problem.num_experts}. "
                f"Give one device index, or a list of them, for each expert."
            )
    return tuple(
        tuple(
            _copies(entry, num_devices, f"layer {layer_index} puts expert {expert_id}")
            for expert_id, entry in enumerate(layer)
        )
        for layer_index, layer in enumerate(devices_of_expert)
    )


def _copies(entry: Any, num_devices: int, where: str) -> tuple[int, ...]:
    copies = tuple(entry) if isinstance(entry, list | tuple) else (entry,)
    if not copies:
        raise PlacementError(f"placement: {where} on no device. Give at least one device index.")
    for device_index in copies:
        is_index = isinstance(device_index, int) and not isinstance(device_index, bool)
        if not is_index or not 0 <= device_index < num_devices:
            raise PlacementError(
                f"placement: {where} on device {device_index!r}; "
                f"allowed are the indices 0 to {num_devices - 1} of device_names."
            )
    if len(set(copies)) < len(copies):
        raise PlacementError(f"placement: {where} twice on one device, of {list(copies)}. Give each device once.")
    return copies
