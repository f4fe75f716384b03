"""The devices that ``moe-bitnet place`` plans on: logical ones, a catalogue's, a file's, or those of a Ray cluster."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.topology import MAX_LOGICAL_DEVICES, Topology, logical_devices
from moe_bitnet.cli.planning.device_catalogue import DEVICE_CATALOGUE, catalogue_topology
from moe_bitnet.cli.planning.device_pool import DevicePool, describe_memory
from moe_bitnet.errors import ConfigError
from moe_bitnet.units import parse_memory

DEFAULT_DEVICES = 8
DEFAULT_DEVICE_MEMORY = "5.5MB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group("devices")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--device-memory",
        metavar="SIZE",
        help=f"equal devices with so much usable memory, such as 24GB or 512MiB (default for a run: "
        f"{DEFAULT_DEVICE_MEMORY}, which suits the demo)",
    )
    kind.add_argument("--device", metavar="NAME", help=f"equal devices of the catalogue: {', '.join(DEVICE_CATALOGUE)}")
    kind.add_argument("--topology", type=Path, metavar="FILE", help="JSON file with devices, and perhaps their links")
    kind.add_argument(
        "--discover", action="store_true", help="measure the free memory and the links of the Ray cluster at --address"
    )
    group.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help=f"use no more than so many (default: {DEFAULT_DEVICES} for a run, else as many as it takes)",
    )
    group.add_argument(
        "--reserve", metavar="SIZE", help="keep so much of each device free (default: by kind; a file states its own)"
    )
    group.add_argument(
        "--label", action="append", default=[], metavar="KEY=VALUE", help="with --discover: only nodes with this label"
    )
    group.add_argument(
        "--save-topology", type=Path, metavar="FILE", help="write the devices planned on, for --topology"
    )


def find_devices(args: argparse.Namespace, default_reserve: int | None = None) -> DevicePool:
    """Return the devices that the options name; with ``--discover`` Ray is asked, and started if need be.

    Args:
        args: the options of :func:`add_arguments`, and ``--address``.
        default_reserve: bytes to keep free on discovered devices without ``--reserve``; ``None`` is the usual.
    Raises:
        ConfigError: none is named, a name or a number is not allowed, or options contradict each other.
        ClusterError: the cluster does not answer.
    """
    reserve = None if args.reserve is None else parse_memory(args.reserve)
    if args.label and not args.discover:
        raise ConfigError("--label chooses nodes of a Ray cluster. Give --discover too, or leave it out.")
    if args.device:
        topology = catalogue_topology(args.device, MAX_LOGICAL_DEVICES, reserve)
        return _named(args.device.lower(), topology, is_open=True).limited(args.devices)
    if args.device_memory:
        topology = _logical(parse_memory(args.device_memory), reserve or 0)
        return _named("a logical device", topology, is_open=True).limited(args.devices)
    if args.topology:
        if reserve is not None:
            raise ConfigError(
                f"--reserve: {args.topology} states what is reserved. Change it there, or leave this out."
            )
        return _named(str(args.topology), Topology.from_json(args.topology)).limited(args.devices)
    if args.discover:
        reserve = default_reserve if reserve is None else reserve
        topology = _discover(args.address, reserve, _labels(args.label))
        return _named("the Ray cluster", topology).limited(args.devices)
    raise ConfigError("no devices were given. Give --device NAME, --device-memory SIZE, --topology FILE or --discover.")


def _named(name: str, topology: Topology, is_open: bool = False) -> DevicePool:
    return DevicePool(f"{name} ({describe_memory(topology)})", topology, is_open)


def _logical(memory_bytes: int, reserved_bytes: int) -> Topology:
    if memory_bytes <= reserved_bytes:
        raise ConfigError(
            f"--device-memory is {memory_bytes} bytes, --reserve {reserved_bytes}: nothing is left. Give more memory."
        )
    return logical_devices(MAX_LOGICAL_DEVICES, memory_bytes - reserved_bytes)


def _discover(address: str | None, reserved_bytes: int | None, labels: dict[str, str]) -> Topology:
    from cluster.discovery import discover_topology  # imports Ray
    from cluster.runtime import connect

    with connect(ClusterConfig(address=address)):
        topology = discover_topology(reserved_bytes, labels=labels)
    if address is None and len({device.node_id for device in topology.devices}) == 1:
        # a Ray of this command alone: its node ends with it, and a written plan must not ask for it again
        return Topology(tuple(dataclasses.replace(device, node_id=None) for device in topology.devices))
    return topology


def _labels(texts: Sequence[str]) -> dict[str, str]:
    labels = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--label is {text!r}; give KEY=VALUE.")
        labels[key] = value
    return labels
