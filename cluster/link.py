"""What lies between two devices: a bandwidth and a latency.

In come measurements or a user's figures; out come checked :class:`Link` objects, which
:class:`cluster.topology.Topology` looks up by the devices at both ends. In JSON:

    {"source": "a", "destination": "b", "bandwidth_bytes_per_s": 1.2e9, "latency_s": 5e-5}

and the same without ends for the speed of all pairs that are not listed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, TypeVar

from moe_bitnet.errors import ConfigError

_SPEED_FIELDS = ("bandwidth_bytes_per_s", "latency_s")
_END_FIELDS = ("source", "destination")
_T = TypeVar("_T")


@dataclass(frozen=True)
class LinkSpeed:
    """How fast bytes cross.

    Attributes:
        bandwidth_bytes_per_s: payload bytes a second in one direction, above 0.
        latency_s: seconds that a small message takes one way, at least 0.

    Raises:
        ConfigError: a value is out of range.
    """

    bandwidth_bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not _is_number(self.bandwidth_bytes_per_s) or not self.bandwidth_bytes_per_s > 0:
            raise ConfigError(
                f"link: bandwidth_bytes_per_s is {self.bandwidth_bytes_per_s!r}; give a positive number of bytes a "
                f"second."
            )
        if not _is_number(self.latency_s) or not 0 <= self.latency_s < inf:
            raise ConfigError(f"link: latency_s is {self.latency_s!r}; give a number of seconds of at least 0.")

    def seconds(self, num_bytes: float) -> float:
        """Return the seconds that one message of ``num_bytes`` takes one way."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_per_s

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that :func:`read_speed` takes back."""
        return asdict(self)


@dataclass(frozen=True)
class Link:
    """The speed from one place to another.

    Attributes:
        source: name of a device, or id of a node for all devices on it.
        destination: the same, another one.
        bandwidth_bytes_per_s: as in :class:`LinkSpeed`, from source to destination.
        latency_s: the same.

    Raises:
        ConfigError: an end is empty or no string, both are the same, or the speed is out of range.
    """

    source: str
    destination: str
    bandwidth_bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        for field in _END_FIELDS:
            value = getattr(self, field)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"link: {field} is {value!r}; give the name of a device or the id of a node.")
        if self.source == self.destination:
            raise ConfigError(f"link: source and destination are both {self.source!r}; give two different ends.")
        _ = self.speed  # checks it

    @property
    def speed(self) -> LinkSpeed:
        """How fast bytes cross."""
        return LinkSpeed(self.bandwidth_bytes_per_s, self.latency_s)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that :func:`read_link` takes back."""
        return asdict(self)


def read_link(entry: Any, source: str) -> Link:
    """Read a link from parsed JSON, in the form shown at the top of this module.

    Args:
        entry: the parsed JSON value.
        source: what to call it in an error.
    Raises:
        ConfigError: unknown or missing fields, or impossible values.
    """
    return _read(Link, entry, (*_END_FIELDS, *_SPEED_FIELDS), source)


def read_speed(entry: Any, source: str) -> LinkSpeed:
    """Read a speed from parsed JSON; arguments and errors as in :func:`read_link`."""
    return _read(LinkSpeed, entry, _SPEED_FIELDS, source)


def _read(kind: type[_T], entry: Any, fields: Sequence[str], source: str) -> _T:
    required = set(fields) - {"latency_s"}
    if not isinstance(entry, dict) or not required <= set(entry) <= set(fields):
        raise ConfigError(f"{source}: expected an object with {', '.join(fields)} (latency_s may be left out).")
    try:
        return kind(**entry)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


SAME_NODE = LinkSpeed(inf, 0.0)
"""Between devices of one node: no network is crossed."""
