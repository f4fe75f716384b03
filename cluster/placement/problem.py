"""What must be placed: the experts of one model, and the devices that may take them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.topology import Device, Topology, read_json
from moe_bitnet.errors import ConfigError
from moe_bitnet.files import write_json_atomically

_SIZES = ("num_layers", "num_experts", "expert_bytes", "home_bytes")


@dataclass(frozen=True)
class PlacementProblem:
    """Equal experts, the rest of the model, and a topology.

    An expert is named by ``(layer_index, expert_id)``; expert ids start at 0 in every layer.

    Attributes:
        num_layers: L, layers that hold a mixture of experts.
        num_experts: E, routed experts in each layer.
        expert_bytes: stored size of one expert, the same for all.
        home_bytes: all that is not a routed expert (embedding, attention, norms, routers, shared experts);
            it lives on the home device.
        topology: the devices to choose from.

    Raises:
        ConfigError: a size is out of range.
    """

    num_layers: int
    num_experts: int
    expert_bytes: int
    home_bytes: int
    topology: Topology

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            smallest = 0 if name == "home_bytes" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ConfigError(f"PlacementProblem: {name} is {value!r}; give an integer of at least {smallest}.")
        if not isinstance(self.topology, Topology):
            raise ConfigError(f"PlacementProblem: topology is {self.topology!r}; give a Topology.")

    @property
    def total_experts(self) -> int:
        """Experts of all layers, ``L * E``."""
        return self.num_layers * self.num_experts

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts and of the home part."""
        return self.total_experts * self.expert_bytes + self.home_bytes

    def slots_on(self, device: Device, is_home: bool = False) -> int:
        """Return how many experts fit on ``device``, beside the home part if it is the home."""
        free_bytes = device.usable_bytes - (self.home_bytes if is_home else 0)
        return max(0, free_bytes) // self.expert_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that :meth:`from_dict` takes back."""
        return {**{name: getattr(self, name) for name in _SIZES}, "topology": self.topology.to_dict()}

    @classmethod
    def from_dict(cls, values: Any, source: str = "placement problem") -> "PlacementProblem":
        """Build a problem from parsed JSON.

        Args:
            values: the parsed JSON value: an object with the fields of this class.
            source: what to call the input in an error, such as a file name.
        Raises:
            ConfigError: not an object, unknown or missing fields, or impossible sizes.
        """
        fields = {*_SIZES, "topology"}
        if not isinstance(values, dict) or set(values) != fields:
            raise ConfigError(f"{source}: expected a JSON object with exactly the fields {', '.join(sorted(fields))}.")
        topology = Topology.from_dict(values["topology"], source=f"{source}: topology")
        return cls(**{name: values[name] for name in _SIZES}, topology=topology)

    def to_json(self, path: Path) -> None:
        """Write the problem to ``path``, whole or not at all."""
        write_json_atomically(path, self.to_dict())

    @classmethod
    def from_json(cls, path: Path) -> "PlacementProblem":
        """Read a problem from a JSON file.

        Raises:
            ConfigError: the file cannot be read, is not JSON, or holds impossible sizes.
        """
        return cls.from_dict(read_json(path, "a placement problem"), source=str(path))
