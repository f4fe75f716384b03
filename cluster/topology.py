"""The devices of a cluster, the memory each one offers to a model, and the links between them.

In come descriptions, from code, a JSON file or :mod:`cluster.discovery`; out goes a checked
:class:`Topology`, the ground that :mod:`cluster.placement` plans on. Nothing is
probed here: capacity is what the caller says, less what the caller reserves.

    {"devices": [{"name": "a", "memory_bytes": "24GB", "reserved_bytes": "4GB"},
                 {"name": "b", "memory_bytes": 80000000000, "kind": "cuda", "node_id": "n1", "index": 0}],
     "links": [{"source": "a", "destination": "b", "bandwidth_bytes_per_s": 1.2e9, "latency_s": 5e-5}],
     "default_link": {"bandwidth_bytes_per_s": 1e9}}

Only ``devices`` with ``name`` and ``memory_bytes`` are needed. A link holds for both directions unless
the way back is listed too; an end is a device, or a node for all its devices.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from cluster.link import SAME_NODE, Link, LinkSpeed, read_link, read_speed
from moe_bitnet import files
from moe_bitnet.errors import ConfigError
from moe_bitnet.units import parse_memory

DeviceKind = Literal["cpu", "cuda"]
"""Where a device's memory is: a host's RAM, or a GPU."""

_REQUIRED = {"name", "memory_bytes"}
_OPTIONAL = {"reserved_bytes", "kind", "node_id", "index"}


@dataclass(frozen=True)
class Device:
    """One memory that experts can be placed in: a GPU, or a share of a host's RAM.

    Attributes:
        name: unique within its topology.
        memory_bytes: all memory of the device, at least 1.
        reserved_bytes: what is not for weights: interpreter, workspace, KV cache and a margin
            (:func:`cluster.reserve.reserve_bytes`); less than ``memory_bytes``.
        kind: ``"cpu"`` or ``"cuda"``.
        node_id: the Ray node that the device is on; ``None`` where it is not known or does not matter.
        index: number of the device among those of its kind on its node, as in ``cuda:0``.

    Raises:
        ConfigError: an empty name, or values out of range.
    """

    name: str
    memory_bytes: int
    reserved_bytes: int = 0
    kind: DeviceKind = "cpu"
    node_id: str | None = None
    index: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"Device: name is {self.name!r}; give a string that is not empty.")
        for field, value, smallest in (
            ("memory_bytes", self.memory_bytes, 1),
            ("reserved_bytes", self.reserved_bytes, 0),
            ("index", self.index, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ConfigError(
                    f"Device {self.name!r}: {field} is {value!r}; give an integer of at least {smallest}."
                )
        if self.kind not in get_args(DeviceKind):
            raise ConfigError(
                f"Device {self.name!r}: kind is {self.kind!r}; allowed are {', '.join(get_args(DeviceKind))}."
            )
        if self.node_id is not None and (not isinstance(self.node_id, str) or not self.node_id):
            raise ConfigError(f"Device {self.name!r}: node_id is {self.node_id!r}; give a node's id, or null.")
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
    """The devices of a cluster, in the order their owner listed them, and the links between them.

    Attributes:
        devices: at least one, with distinct names; any sequence is taken and kept as a tuple.
        links: speeds between devices or nodes, each pair of ends at most once.
        default_link: speed between devices on different nodes that no link names; ``None`` if it is not known.

    Raises:
        ConfigError: no device, a name or link given twice, or a link with an end that does not exist.
    """

    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    default_link: LinkSpeed | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(self.devices))
        object.__setattr__(self, "links", tuple(self.links))
        _check_devices(self.devices)
        _check_links(self.links, self.devices)

    @property
    def num_devices(self) -> int:
        """Number of devices, at least 1."""
        return len(self.devices)

    def device(self, name: str) -> Device:
        """Return the device with a name.

        Raises:
            ConfigError: there is none.
        """
        if name not in self._device_of_name:
            raise ConfigError(f"device {name!r} is not in the topology, which has {', '.join(self._device_of_name)}.")
        return self._device_of_name[name]

    def link(self, source: str, destination: str) -> LinkSpeed | None:
        """Return the speed between two devices.

        Args:
            source: name of the device that sends.
            destination: name of the device that receives.
        Returns:
            ``SAME_NODE`` within one node; else the speed listed for the two devices, for their nodes, or in
            the other direction, whichever is found first; else ``default_link``, which may be ``None``.
        Raises:
            ConfigError: a device is not in the topology.
        """
        start, end = self.device(source), self.device(destination)
        if source == destination or (start.node_id is not None and start.node_id == end.node_id):
            return SAME_NODE
        starts, ends = (start.name, start.node_id), (end.name, end.node_id)
        pairs = [(from_, to) for from_ in starts for to in ends]  # devices first, nodes last
        for pair in (*pairs, *((to, from_) for from_, to in pairs)):
            if pair in self._speed_of_ends:
                return self._speed_of_ends[pair]
        return self.default_link

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that :meth:`from_dict` takes back."""
        values: dict[str, Any] = {"devices": [asdict(device) for device in self.devices]}
        if self.links:
            values["links"] = [link.to_dict() for link in self.links]
        if self.default_link is not None:
            values["default_link"] = self.default_link.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Any, source: str = "topology") -> "Topology":
        """Build a topology from parsed JSON.

        Args:
            values: the parsed JSON value, in the form shown at the top of this module; sizes are
                integers in bytes or strings that :func:`parse_memory` reads.
            source: what to call the input in an error, such as a file name.
        Raises:
            ConfigError: another form, unknown or missing fields, or impossible values.
        """
        if not isinstance(values, dict) or not {"devices"} <= set(values) <= {"devices", "links", "default_link"}:
            raise ConfigError(
                f'{source}: expected a JSON object {{"devices": [...]}}, perhaps with links and default_link, and no '
                f"other field."
            )
        devices, links, default_link = values["devices"], values.get("links", []), values.get("default_link")
        if not isinstance(devices, list) or not isinstance(links, list):
            raise ConfigError(f"{source}: devices and links must be lists.")
        speed = None if default_link is None else read_speed(default_link, f"{source}: default_link")
        read_devices = tuple(_read_device(entry, f"{source}: device {i}") for i, entry in enumerate(devices))
        read_links = tuple(read_link(entry, f"{source}: link {i}") for i, entry in enumerate(links))
        try:
            return cls(read_devices, read_links, speed)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error

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

    @cached_property
    def _device_of_name(self) -> dict[str, Device]:
        return {device.name: device for device in self.devices}

    @cached_property
    def _speed_of_ends(self) -> dict[tuple[str | None, str | None], LinkSpeed]:
        return {(link.source, link.destination): link.speed for link in self.links}


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


def _check_devices(devices: Sequence[Device]) -> None:
    if not devices:
        raise ConfigError("Topology: no device was given. Give at least one.")
    repeated = _repeated([device.name for device in devices])
    if repeated:
        raise ConfigError(f"Topology: device names given twice: {', '.join(repeated)}. Make every name unique.")
    gpus = [f"cuda:{each.index} on node {each.node_id}" for each in devices if each.kind == "cuda" and each.node_id]
    if repeated := _repeated(gpus):
        raise ConfigError(f"Topology: GPUs given twice: {', '.join(repeated)}. List each GPU once.")


def _check_links(links: Sequence[Link], devices: Sequence[Device]) -> None:
    names = [device.name for device in devices]
    node_ids = {device.node_id: None for device in devices if device.node_id is not None}  # in order
    for link in links:
        for end in (link.source, link.destination):
            if end not in names and end not in node_ids:
                nodes = f", and nodes {', '.join(node_ids)}" if node_ids else ""
                raise ConfigError(f"Topology: a link names {end!r}. There are the devices {', '.join(names)}{nodes}.")
    if repeated := _repeated([f"{link.source} → {link.destination}" for link in links]):
        raise ConfigError(f"Topology: links given twice: {', '.join(repeated)}. Give each once.")


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _read_device(entry: Any, source: str) -> Device:
    if not isinstance(entry, dict) or not _REQUIRED <= set(entry) <= _REQUIRED | _OPTIONAL:
        raise ConfigError(
            f"{source}: expected an object with name and memory_bytes, and perhaps {', '.join(sorted(_OPTIONAL))}."
        )
    try:
        sizes = {name: parse_memory(entry[name]) for name in ("memory_bytes", "reserved_bytes") if name in entry}
        return Device(**{**entry, **sizes})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
