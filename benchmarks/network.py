"""Hosts of their own on one machine: network namespaces, joined to this one by pairs of virtual Ethernet devices.

    ┌ this process ┐                       ┌ a host's process ┐
    │       veth-0 │───────────────────────│ eth              │     10.77.0.1 ── 10.77.0.2
    │       veth-1 │──────── … next host   └──────────────────┘     10.77.1.1 ── 10.77.1.2
    └──────────────┘

Nothing but the hosts' frames crosses a pair: IPv6 is off and the neighbours' addresses are set, so that nobody asks for
them. The kernel counts the bytes of both directions, Ethernet headers included. All of it vanishes with the processes.

Needs Linux, the commands ``ip``, ``unshare`` and ``nsenter``, and leave to make namespaces (root, or user namespaces).
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bitnet.errors import ClusterError

INSIDE = "MOE_BITNET_BENCHMARK_NAMESPACE"
"""Environment variable that is set in a process with a network of its own."""

MTU_BYTES = 1500
_COMMANDS = ("ip", "unshare", "nsenter")
_COUNTERS = Path("/proc/self/net/dev")
_HOST_DEVICE = "eth"


def reason_against() -> str | None:
    """Say why namespaces cannot be made here, or return ``None``."""
    missing = [command for command in _COMMANDS if shutil.which(command) is None]
    if missing:
        return f"no command {' and '.join(missing)}"
    trial = "ip link add veth-trial type veth peer name eth-trial && unshare -n true"
    result = subprocess.run([*_unshare(), "sh", "-c", trial], capture_output=True, text=True)
    return None if result.returncode == 0 else f"namespaces are not permitted ({result.stderr.strip()})"


def is_inside() -> bool:
    """Whether this process has a network of its own."""
    return INSIDE in os.environ


def enter(module: str, arguments: Sequence[str]) -> None:
    """Start this program again in a network of its own; does not return.

    Args:
        module: what to run, by ``python -m``.
        arguments: of its command line.
    """
    os.environ[INSIDE] = "1"
    sys.stdout.flush()
    os.execvp("unshare", [*_unshare(), sys.executable, "-m", module, *arguments])


def command_in_namespace(command: Sequence[str]) -> list[str]:
    """Return the command that runs another in one more network; both have the same process id."""
    return ["unshare", "--net", *command]


@dataclass(frozen=True)
class LinkCounts:
    """What crossed some pairs in both directions since they were made.

    Attributes:
        num_bytes: with Ethernet, IP and TCP headers.
        num_packets: as the devices see them.
    """

    num_bytes: int
    num_packets: int

    def __sub__(self, earlier: "LinkCounts") -> "LinkCounts":
        return LinkCounts(self.num_bytes - earlier.num_bytes, self.num_packets - earlier.num_packets)


class VirtualLinks:
    """Pairs of devices between this process's network and those of hosts; made one by one."""

    def __init__(self) -> None:
        _run("ip", "link", "set", "lo", "up")
        self._names: list[str] = []

    def connect(self, process_id: int) -> str:
        """Join the network of a process to this one.

        Args:
            process_id: of a process in a network of its own (:func:`command_in_namespace`).
        Returns:
            the address by which this end reaches the other.
        Raises:
            ClusterError: it could not be done.
        """
        index = len(self._names)
        name, here, there = f"veth-{index}", f"10.77.{index}.1", f"10.77.{index}.2"
        mac_here, mac_there = f"02:00:00:00:{index:02x}:01", f"02:00:00:00:{index:02x}:02"
        inside = ("nsenter", "--net", "-t", str(process_id))
        peer = ("peer", "name", _HOST_DEVICE, "address", mac_there, "netns", str(process_id))
        _run("ip", "link", "add", name, "address", mac_here, "type", "veth", *peer)
        for prefix, device, own, other, mac in (
            ((), name, here, there, mac_there),
            (inside, _HOST_DEVICE, there, here, mac_here),
        ):
            _run(*prefix, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
            _run(*prefix, "ip", "address", "add", f"{own}/24", "dev", device)
            _run(*prefix, "ip", "link", "set", device, "mtu", str(MTU_BYTES), "up")
            _run(*prefix, "ip", "neighbour", "add", other, "lladdr", mac, "dev", device, "nud", "permanent")
        self._names.append(name)
        return there

    def limit_packets(self, process_ids: Sequence[int], max_packet_bytes: int) -> None:
        """Limit the packets that the kernel hands to the devices.

        Args:
            process_ids: of all hosts, in the order of :meth:`connect`.
            max_packet_bytes: 65536 lets a packet be many segments, as with cards that cut them up (TSO); the size of
                a segment makes every segment a packet with headers of its own, as on a wire.
        Raises:
            ClusterError: it could not be done.
        """
        for name, process_id in zip(self._names, process_ids, strict=True):
            limits = ("gso_max_size", str(max_packet_bytes), "gro_max_size", str(max_packet_bytes))
            _run("ip", "link", "set", name, *limits)
            _run("nsenter", "--net", "-t", str(process_id), "ip", "link", "set", _HOST_DEVICE, *limits)

    def counts(self) -> LinkCounts:
        """Read the counters of all pairs."""
        return parse_counters(_COUNTERS.read_text(encoding="ascii"), self._names)


def retransmitted_segments(process_ids: Sequence[int]) -> int:
    """Return the TCP segments sent again so far, in the networks of this process and of others."""
    paths = [Path("/proc/self/net/snmp"), *(Path(f"/proc/{each}/net/snmp") for each in process_ids)]
    return sum(parse_retransmitted(path.read_text(encoding="ascii")) for path in paths)


def parse_retransmitted(text: str) -> int:
    """Return ``RetransSegs`` of a text like ``/proc/net/snmp``: a line of names, then a line of numbers."""
    names, numbers = (line.split() for line in text.splitlines() if line.startswith("Tcp:"))
    return int(numbers[names.index("RetransSegs")])


def parse_counters(text: str, names: Sequence[str]) -> LinkCounts:
    """Add up bytes and packets of some devices in both directions.

    Args:
        text: of ``/proc/net/dev``.
        names: of the devices.
    """
    num_bytes = num_packets = 0
    for line in text.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() in names:
            values = [int(number) for number in numbers.split()]
            num_bytes += values[0] + values[8]
            num_packets += values[1] + values[9]
    return LinkCounts(num_bytes, num_packets)


def _unshare() -> list[str]:
    as_root = os.geteuid() == 0
    return ["unshare", "--net", *([] if as_root else ["--user", "--map-root-user"])]


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise ClusterError(f"'{' '.join(command)}' failed: {result.stderr.strip()}")
