"""Where the experts are and where their hosts listen; travels between a cluster's owner, hosts and guests."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.placement.placement import Placement
from cluster.transport.sockets import HostAddress


@dataclass(frozen=True)
class Directory:
    """A plan in force.

    Attributes:
        epoch: its number.
        placement: devices of every expert.
        addresses: of the hosts.
        actors: of the hosts, by device name.
    """

    epoch: int
    placement: Placement
    addresses: tuple[HostAddress, ...]
    actors: Mapping[str, Any]
