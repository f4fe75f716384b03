"""From the placement in force to a better one, or one for other devices, with few moves; never from scratch.

    cost = moved bytes + horizon_tokens · bytes_per_visit · visits per token        under the load cap

What can stay is found first (``kept_copies``); experts without a copy get the least loaded device; then the local
search runs from there, and a move to a device without a copy costs the expert's bytes. A hot trace thus moves
much, a cold one little, and a placement that need not change comes back as it was.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.placement.arrays import IntArray
from cluster.placement.kept_copies import KeptCopies, keep_copies
from cluster.placement.layer_problem import LayerProblem
from cluster.placement.local_search import improve_layer
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.solver import DEFAULT_MAX_IMBALANCE
from cluster.placement.traced_solver import layer_problem, link_costs
from cluster.placement.traffic import check_trace
from cluster.routing.trace import RoutingTrace
from moe_bitnet.errors import ConfigError

DEFAULT_HORIZON_TOKENS = 1_000_000
DEFAULT_BYTES_PER_VISIT = 8192.0
"""Of one visit there and back: rows of 2048 values, int8 out and float32 sums home, weigh a little more."""

_NUM_SHAKES = 8


@dataclass(frozen=True)
class Move:
    """One copy of an expert to be loaded.

    Attributes:
        layer_index: the MoE layer.
        expert_id: the expert.
        source: a device that holds it now and stays in the topology, or ``None``: it comes from disk.
        target: the device to load it on.
        num_bytes: of the expert.
    """

    layer_index: int
    expert_id: int
    source: str | None
    target: str
    num_bytes: int


@dataclass(frozen=True)
class Rebalance:
    """A new placement and the way to it.

    Attributes:
        placement: to switch to once all moves are done; copies that it does not name may then be dropped.
        moves: in the order of layers and experts.
        moved_home_bytes: bytes of the home part if the home had to change, else 0.
    """

    placement: Placement
    moves: tuple[Move, ...]
    moved_home_bytes: int = 0

    @property
    def moved_bytes(self) -> int:
        """Bytes to load, in all."""
        return self.moved_home_bytes + sum(move.num_bytes for move in self.moves)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {
            "placement": self.placement.to_dict(),
            "moves": [asdict(move) for move in self.moves],
            "moved_home_bytes": self.moved_home_bytes,
            "moved_bytes": self.moved_bytes,
        }


def rebalance_placement(
    problem: PlacementProblem,
    old: Placement,
    *,
    trace: RoutingTrace | None = None,
    num_devices: int | None = None,
    max_imbalance: float = DEFAULT_MAX_IMBALANCE,
    horizon_tokens: float = DEFAULT_HORIZON_TOKENS,
    bytes_per_visit: float = DEFAULT_BYTES_PER_VISIT,
    seed: int = 0,
) -> Rebalance:
    """Adapt a placement to other devices, or to another routing.

    Replicas stay where there is room; their share of the load is not counted, and no new ones are made. A copy
    that is left of a lost expert becomes its primary at no cost.

    Args:
        problem: the same experts on the new topology; devices are recognised by name.
        old: the placement in force.
        trace: recent routing; without one only the number of experts is evened out.
        num_devices: devices to use; ``None`` for those of ``old`` that are left, and as many more as memory needs.
        max_imbalance: load of a device over the mean, at most, in every layer, as far as it can be reached.
        horizon_tokens: tokens that the new placement will serve: what a visit saved is worth.
        bytes_per_visit: bytes that a token's visit to a device costs, there and back.
        seed: of random numbers.
    Returns:
        The new placement, with the old home if it is left, and the moves.
    Raises:
        PlacementError: the experts no longer fit, or placement or trace are of another model.
        ConfigError: ``horizon_tokens`` or ``bytes_per_visit`` is not positive.
    """
    for name, value in (("horizon_tokens", horizon_tokens), ("bytes_per_visit", bytes_per_visit)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"rebalance: {name} is {value!r}; give a positive number.")
    if trace is not None:
        check_trace(trace, problem.num_layers, problem.num_experts)
    kept = keep_copies(problem, old, num_devices)
    rooms = _rooms(kept)
    generators = np.random.default_rng(seed).spawn(problem.num_layers)
    moving_cost = problem.expert_bytes / (horizon_tokens * bytes_per_visit)  # in visits of every token
    layers = []
    for layer_index, generator in enumerate(generators):
        layer = _layer_problem(problem, kept, trace, layer_index, rooms[layer_index], max_imbalance, moving_cost)
        num_shakes = 0 if trace is None else _NUM_SHAKES
        primaries = improve_layer(layer, _start(layer, kept.copies[layer_index]), num_shakes, generator)
        layers.append(_with_replicas(primaries, kept.copies[layer_index]))
    placement = Placement.for_problem(problem, kept.device_names, layers)
    has_home_moved = placement.device_names[0] != old.device_names[0]
    return Rebalance(placement, _moves(problem, old, placement), problem.home_bytes if has_home_moved else 0)


def _layer_problem(
    problem: PlacementProblem,
    kept: KeptCopies,
    trace: RoutingTrace | None,
    layer_index: int,
    room: IntArray,
    max_imbalance: float,
    moving_cost: float,
) -> LayerProblem:
    num_experts, num_devices = problem.num_experts, len(kept.device_names)
    replicas = np.zeros(num_devices, dtype=np.int64)
    for devices in kept.copies[layer_index]:
        replicas[devices[1:]] += 1
    is_kept = np.zeros((num_experts, num_devices), dtype=bool)
    for expert_id, devices in enumerate(kept.copies[layer_index]):
        is_kept[expert_id, devices] = True
    visit_costs = link_costs(problem, kept.device_names)
    if trace is None:  # every expert is as hot as the next, and no two are visited together
        trace, visit_costs = RoutingTrace(np.arange(num_experts)[:, None, None], num_experts), np.zeros(num_devices)
        layer_index, moving_cost = 0, 1.0 / num_experts
        max_imbalance = max(max_imbalance, -(-num_experts // num_devices) * num_devices / num_experts)
    layer = layer_problem(trace, layer_index, room - replicas, visit_costs, max_imbalance)
    costs = np.where(is_kept, 0.0, moving_cost * len(layer.expert_indices))
    return LayerProblem(
        layer.expert_indices, layer.expert_loads, layer.max_counts, layer.visit_costs, layer.load_cap, costs
    )


def _rooms(kept: KeptCopies) -> IntArray:
    """Share the slots out to the layers: what is kept, room for experts that are lost, then all the rest.

    Returns:
        ``[num_layers, num_devices]`` copies that each layer may have on each device.
    """
    rooms = kept.counts()
    free = np.array(kept.slots) - rooms.sum(axis=0)
    for layer_index, layer in enumerate(kept.copies):
        for _ in range(sum(not devices for devices in layer)):
            device = int(free.argmax())
            rooms[layer_index, device] += 1
            free[device] -= 1
    num_layers = len(rooms)
    for device, num_free in enumerate(free.tolist()):
        rooms[:, device] += num_free // num_layers
        rooms[: num_free % num_layers, device] += 1
    return rooms


def _start(layer: LayerProblem, copies: list[list[int]]) -> IntArray:
    """Leave experts where they are; those without a copy go, hottest first, to the least loaded device with room."""
    primaries = np.array([devices[0] if devices else -1 for devices in copies])
    is_placed = primaries >= 0
    counts = np.bincount(primaries[is_placed], minlength=layer.num_devices)
    loads = np.bincount(
        primaries[is_placed], weights=layer.expert_loads[is_placed], minlength=layer.num_devices
    ).astype(float)
    for expert_id in sorted(np.flatnonzero(~is_placed).tolist(), key=lambda expert: -layer.expert_loads[expert]):
        device = int(np.where(counts < layer.max_counts, loads, np.inf).argmin())
        primaries[expert_id] = device
        counts[device] += 1
        loads[device] += layer.expert_loads[expert_id]
    return primaries


def _with_replicas(primaries: IntArray, copies: list[list[int]]) -> list[list[int]]:
    """Put the primaries before the replicas; a primary that has moved leaves no copy behind."""
    return [
        [primary, *(device for device in devices[1:] if device != primary)]
        for primary, devices in zip(primaries.tolist(), copies, strict=True)
    ]


def _moves(problem: PlacementProblem, old: Placement, new: Placement) -> tuple[Move, ...]:
    present = {device.name for device in problem.topology.devices}
    moves = []
    for layer_index, (old_layer, new_layer) in enumerate(
        zip(old.devices_of_expert, new.devices_of_expert, strict=True)
    ):
        for expert_id, (old_copies, new_copies) in enumerate(zip(old_layer, new_layer, strict=True)):
            held = [old.device_names[device] for device in old_copies]
            source = next((name for name in held if name in present), None)
            moves += [
                Move(layer_index, expert_id, source, new.device_names[device], problem.expert_bytes)
                for device in new_copies
                if new.device_names[device] not in held
            ]
    return tuple(moves)
