"""The devices that a plan may use: a fixed set, or as many of one size as it needs."""

from dataclasses import dataclass, replace

from cluster.topology import MAX_LOGICAL_DEVICES, Topology, logical_devices
from moe_bitnet.errors import ConfigError
from moe_bitnet.units import format_bytes


@dataclass(frozen=True)
class DevicePool:
    """Devices to choose from.

    Attributes:
        name: for people.
        topology: the devices.
        is_open: they are equal, and there are so many only because there has to be a number; a plan takes the
            first ones.
        max_devices: a plan may use no more of them; ``None`` is no limit.
    """

    name: str
    topology: Topology
    is_open: bool = False
    max_devices: int | None = None

    def limited(self, max_devices: int | None) -> "DevicePool":
        """Return the pool with a limit on the devices of one plan; equal devices become so many.

        Raises:
            ConfigError: the limit is below 1, or more than there are.
        """
        if max_devices is None:
            return self
        devices, available = self.topology.devices, self.topology.num_devices
        if not 1 <= max_devices <= available:
            names = "" if self.is_open else f" ({', '.join(device.name for device in devices)})"
            raise ConfigError(
                f"--devices is {max_devices}, but {self.name} has {available}{names}. Give 1 to {available}, or leave "
                f"it out."
            )
        if self.is_open:
            return DevicePool(self.name, Topology(devices[:max_devices]))
        return replace(self, max_devices=max_devices)


def larger_topology(topology: Topology) -> Topology | None:
    """Return very many devices like those of a topology, to count how many would be needed; ``None`` if they differ."""
    usable = {device.usable_bytes for device in topology.devices}
    return logical_devices(MAX_LOGICAL_DEVICES, usable.pop()) if len(usable) == 1 else None


def describe_memory(topology: Topology) -> str:
    """Say how much memory the devices have, for people; ranges where they differ."""
    memory = sorted({device.memory_bytes for device in topology.devices})
    usable = sorted({device.usable_bytes for device in topology.devices})
    return f"{_range(memory)}, {_range(usable)} usable" if memory != usable else f"{_range(usable)} usable"


def _range(sizes: list[int]) -> str:
    return format_bytes(sizes[0]) if len(sizes) == 1 else f"{format_bytes(sizes[0])} to {format_bytes(sizes[-1])}"
