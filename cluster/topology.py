"""The devices of a cluster and the memory each one offers to a model.

In come device descriptions, from code or from a JSON file; out goes a checked
:class:`Topology`, the ground that :mod:`cluster.placement` plans on. Nothing is
probed here: capacity is what the caller says, less what the caller reserves.

    {"devices": [{"name": "a", "memory_bytes": "24GB", "reserved_bytes": "4GB"},
                 {"name": "b", "memory_bytes": 80000000000}]}
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_bitnet import files
from moe_bitnet.errors import ConfigError
from moe_bitnet.units import parse_memory


@dataclass(frozen=True)
class Device:
    """One memory that experts can be placed in: a GPU, or a share of a host's RAM.

    Attributes:
        name: unique within its topology.
        memory_bytes: all memory of the device, at least 1.
        reserved_bytes: what is not for weights: interpreter, workspace, KV cache and a margin;
            less than ``memory_bytes``.

    Raises:
        ConfigError: an empty name, or sizes out of range.
    """

    name: str
    memory_bytes: int
    reserved_bytes: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"Device: name is {self.name!r}; give a string that is not empty.")
        for field, value, smallest in (
            ("memory_bytes", self.memory_bytes, 1),
            ("reserved_bytes", self.reserved_bytes, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ConfigError(
                    f"Device {self.name!r}: {field} is {value!r}; give an integer of at least {smallest}, in bytes."
                )
        if self.reserved_bytes >= self.memory_bytes:
            raise ConfigError(
                f"Device {self.name!r}: reserved_bytes {self.reserved_bytes} leaves nothing of memory_bytes "
                f"{self.memory_bytes}. Reserve less, or leave the device out."
            )

    @property
    def usable_bytes(self) -> int:
        """Bytes that weights may fill, at least 1."""
        return self.memory_bytes - self.reserved_bytes


@dataclass(frozen=True)
class Topology:
    """The devices of a cluster, in the order their owner listed them.

    Attributes:
        devices: at least one, with distinct names; any sequence is taken and kept as a tuple.

    Raises:
        ConfigError: no device, or a name given twice.
    """

    devices: tuple[Device, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(self.devices))
        if not self.devices:
            raise ConfigError("Topology: no device was given. Give at least one.")
        names = [device.name for device in self.devices]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"Topology: device names given twice: {', '.join(repeated)}. Make every name unique.")

    @property
    def num_devices(self) -> int:
        """Number of devices, at least 1."""
        return len(self.devices)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that :meth:`from_dict` takes back."""
        return {"devices": [asdict(device) for device in self.devices]}

    @classmethod
    def from_dict(cls, values: Any, source: str = "topology") -> "Topology":
        """Build a topology from parsed JSON.

        Args:
            values: the parsed JSON value, in the form shown at the top of this module; sizes are
                integers in bytes or strings that :func:`parse_memory` reads.
            source: what to call the input in an error, such as a file name.
        Raises:
            ConfigError: another form, unknown or missing fields, or impossible sizes.
        """
        if not isinstance(values, dict) or set(values) != {"devices"} or not isinstance(values["devices"], list):
            raise ConfigError(f'{source}: expected a JSON object {{"devices": [...]}} and no other field.')
        return cls(tuple(_read_device(entry, f"{source}: device {i}") for i, entry in enumerate(values["devices"])))

    def to_json(self, path: Path) -> None:
        """Write the topology to ``path``, whole or not at all."""
        files.write_json_atomically(path, self.to_dict())

    @classmethod
    def from_json(cls, path: Path) -> "Topology":
        """Read a topology from a JSON file.

        Raises:
            ConfigError: the file cannot be read, is not JSON, or describes no possible topology.
        """
        return cls.from_dict(read_json(path, "a topology file"), source=str(path))


MAX_LOGICAL_DEVICES = 4096


def logical_devices(count: int, memory_bytes: int) -> Topology:
    """Make ``count`` equal devices named ``device-0``, ``device-1`` and so on.

    Args:
        count: number of devices, at least 1.
        memory_bytes: usable memory of each, in bytes.
    Raises:
        ConfigError: ``count`` or ``memory_bytes`` is below 1.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_LOGICAL_DEVICES:
        raise ConfigError(f"number of devices is {count!r}; give an integer from 1 to {MAX_LOGICAL_DEVICES}.")
    return Topology(tuple(Device(f"device-{index}", memory_bytes) for index in range(count)))


def read_json(path: Path, wanted: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file, UTF-8.
        wanted: what the file should be, for the error, such as ``"a topology file"``.
    Raises:
        ConfigError: the file cannot be read or is not JSON.
    """
    try:
        return files.read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}). Give {wanted}.") from error


def _read_device(entry: Any, source: str) -> Device:
    required, allowed = {"name", "memory_bytes"}, {"name", "memory_bytes", "reserved_bytes"}
    if not isinstance(entry, dict) or not required <= set(entry) <= allowed:
        raise ConfigError(f"{source}: expected an object with name, memory_bytes and perhaps reserved_bytes.")
    try:
        return Device(entry["name"], parse_memory(entry["memory_bytes"]), parse_memory(entry.get("reserved_bytes", 0)))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
