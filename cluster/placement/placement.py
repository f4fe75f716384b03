"""The answer of the solver, or a user's own: the devices of every expert.

    {"device_names": ["a", "b"],                    device 0, here "a", is the home
     "devices_of_expert": [[0, 0, [1, 0], 1],       layer 0: 0 and 1 on "a", 2 on "b" with a replica on "a", 3 on "b"
                           [0, 1, 0, 1]]}           layer 1

An entry is one device index, or a list of those that hold a copy. All copies are equal; the
first is called the primary, the others are replicas. These two fields are all that a
hand-written file needs. Files written here have lists everywhere, and also carry
``lower_bound`` and ``bytes_per_device`` for the reader; both are computed anew from the
problem when a file is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.placement.bound import device_lower_bound
from cluster.placement.placement_checks import check_devices, copies_of_experts
from cluster.placement.problem import PlacementProblem
from cluster.topology import read_json
from moe_bitnet.errors import PlacementError
from moe_bitnet.files import write_json_atomically
from moe_bitnet.units import format_bytes

_REQUIRED = {"device_names", "devices_of_expert"}
_COMPUTED = {"lower_bound", "bytes_per_device"}


@dataclass(frozen=True)
class Placement:
    """At least one device for each expert. Build it with :meth:`for_problem` or :meth:`from_dict`, which check it.

    Attributes:
        device_names: the devices in use, each once; device 0 is the home, where tokens and all that is
            not a routed expert live.
        devices_of_expert: ``[num_layers][num_experts]`` distinct indices into ``device_names``, one for each copy;
            the first is the primary copy.
        lower_bound: no placement of this model needs fewer devices than this.
        bytes_per_device: model bytes on each device, home part and every copy included.
    """

    device_names: tuple[str, ...]
    devices_of_expert: tuple[tuple[tuple[int, ...], ...], ...]
    lower_bound: int
    bytes_per_device: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Devices in use."""
        return len(self.device_names)

    @property
    def num_layers(self) -> int:
        """L, layers that hold a mixture of experts."""
        return len(self.devices_of_expert)

    @property
    def num_experts(self) -> int:
        """E, experts in each layer."""
        return len(self.devices_of_expert[0])

    @property
    def num_replicas(self) -> int:
        """Copies beyond the first of every expert, in all layers."""
        return sum(len(copies) - 1 for layer in self.devices_of_expert for copies in layer)

    @property
    def has_replicas(self) -> bool:
        """Whether any expert has more than one copy."""
        return self.num_replicas > 0

    def primary_devices(self, layer_index: int) -> list[int]:
        """Return the device of the primary copy of each expert of one layer."""
        return [copies[0] for copies in self.devices_of_expert[layer_index]]

    def expert_ids_on(self, device_index: int, layer_index: int) -> list[int]:
        """Return the experts of one layer that have a copy on one device, ascending."""
        layer = self.devices_of_expert[layer_index]
        return [expert_id for expert_id, copies in enumerate(layer) if device_index in copies]

    def experts_on(self, device_index: int) -> dict[int, list[int]]:
        """Return the experts that have a copy on one device, ascending, by layer; a layer without any is there, too."""
        return {layer_index: self.expert_ids_on(device_index, layer_index) for layer_index in range(self.num_layers)}

    def num_experts_per_device(self, layer_index: int) -> list[int]:
        """Return how many experts of one layer each device holds, in device order; every copy counts."""
        counts = [0] * self.num_devices
        for copies in self.devices_of_expert[layer_index]:
            for device_index in copies:
                counts[device_index] += 1
        return counts

    def check(self, problem: PlacementProblem) -> None:
        """Check that this placement solves ``problem``.

        Raises:
            PlacementError: a device is unknown, named twice or over-full, an index names no device, an expert
                has no copy or two on one device, or the number of layers or experts is not the model's.
        """
        check_devices(self.device_names, problem)
        copies_of_experts(self.devices_of_expert, self.num_devices, problem)
        usable = {device.name: device.usable_bytes for device in problem.topology.devices}
        used = _bytes_per_device(problem, self.num_devices, self.devices_of_expert)
        for name, used_bytes in zip(self.device_names, used, strict=True):
            if used_bytes > usable[name]:
                raise PlacementError(
                    f"placement: device {name!r} would hold {format_bytes(used_bytes)} and offers "
                    f"{format_bytes(usable[name])}: {format_bytes(used_bytes - usable[name])} are missing. "
                    f"Move experts to another device, or let the solver place them."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that :meth:`from_dict` takes back."""
        return {
            "device_names": list(self.device_names),
            "devices_of_expert": [[list(copies) for copies in layer] for layer in self.devices_of_expert],
            "lower_bound": self.lower_bound,
            "bytes_per_device": list(self.bytes_per_device),
        }

    @classmethod
    def for_problem(
        cls,
        problem: PlacementProblem,
        device_names: Sequence[str],
        devices_of_expert: Sequence[Sequence[int | Sequence[int]]],
    ) -> "Placement":
        """Build a placement and check it against ``problem``.

        Args:
            problem: what is placed.
            device_names: names from the problem's topology, the home first.
            devices_of_expert: ``[num_layers][num_experts]``; an entry is an index into ``device_names``, or a
                list or tuple of them, the primary copy first.
        Raises:
            PlacementError: see :meth:`check`.
        """
        check_devices(device_names, problem)
        copies = copies_of_experts(devices_of_expert, len(device_names), problem)
        placement = cls(
            device_names=tuple(device_names),
            devices_of_expert=copies,
            lower_bound=device_lower_bound(problem),
            bytes_per_device=_bytes_per_device(problem, len(device_names), copies),
        )
        placement.check(problem)
        return placement

    @classmethod
    def from_dict(cls, values: Any, problem: PlacementProblem, source: str = "placement file") -> "Placement":
        """Build a placement from parsed JSON and check it against ``problem``.

        Args:
            values: the parsed JSON value, in the form shown at the top of this module.
            problem: what is placed; sizes come from here, not from the file.
            source: what to call the input in an error, such as a file name.
        Raises:
            PlacementError: another form, or a placement that does not solve the problem.
        """
        if not isinstance(values, dict) or not _REQUIRED <= set(values) <= _REQUIRED | _COMPUTED:
            raise PlacementError(
                f"{source}: expected a JSON object with device_names and devices_of_expert, and perhaps "
                f"{' and '.join(sorted(_COMPUTED))}."
            )
        names, layers = values["device_names"], values["devices_of_expert"]
        if not isinstance(names, list) or not isinstance(layers, list) or not all(isinstance(x, list) for x in layers):
            raise PlacementError(
                f"{source}: device_names must be a list of names, and devices_of_expert a list with one list for "
                f"each layer: for each expert a device index, or a list of them."
            )
        try:
            return cls.for_problem(problem, names, layers)
        except PlacementError as error:
            raise PlacementError(f"{source}: {error}") from error

    def to_json(self, path: Path) -> None:
        """Write the placement to ``path``, whole or not at all."""
        write_json_atomically(path, self.to_dict())

    @classmethod
    def from_json(cls, path: Path, problem: PlacementProblem) -> "Placement":
        """Read a placement from a JSON file and check it against ``problem``.

        Raises:
            ConfigError: the file cannot be read or is not JSON.
            PlacementError: it holds no placement that solves the problem.
        """
        return cls.from_dict(read_json(path, "a placement file"), problem, source=str(path))


def _bytes_per_device(
    problem: PlacementProblem, num_devices: int, devices_of_expert: Sequence[Sequence[Sequence[int]]]
) -> tuple[int, ...]:
    used = [0] * num_devices
    used[0] = problem.home_bytes
    for layer in devices_of_expert:
        for copies in layer:
            for device_index in copies:
                used[device_index] += problem.expert_bytes
    return tuple(used)
