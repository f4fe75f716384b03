"""Devices by the names that vendors sell them under."""

from dataclasses import dataclass

from cluster.topology import Device, Topology
from moe_bitnet.errors import ConfigError

_GB = 10**9


@dataclass(frozen=True)
class CatalogueDevice:
    """Memory of a product.

    Attributes:
        memory_bytes: as the vendor states it, GB as 1e9 bytes; what a driver reports differs by a few percent.
        reserved_bytes: a rule of thumb for what CUDA, kernels' workspace and fragmentation take: 4 GB below 80 GB of
            memory, 5 GB from there on.
    """

    memory_bytes: int
    reserved_bytes: int


def _of(gigabytes: int) -> CatalogueDevice:
    return CatalogueDevice(gigabytes * _GB, (4 if gigabytes < 80 else 5) * _GB)


DEVICE_CATALOGUE = {
    "t4-16gb": _of(16),
    "l4-24gb": _of(24),
    "rtx-3090-24gb": _of(24),
    "rtx-4090-24gb": _of(24),
    "rtx-5090-32gb": _of(32),
    "v100-32gb": _of(32),
    "a100-40gb": _of(40),
    "rtx-a6000-48gb": _of(48),
    "l40s-48gb": _of(48),
    "a100-80gb": _of(80),
    "h100-80gb": _of(80),
    "h200-141gb": _of(141),
}


def catalogue_topology(name: str, count: int, reserved_bytes: int | None = None) -> Topology:
    """Make equal devices of the catalogue, named ``<name>-0``, ``<name>-1`` and so on.

    Args:
        name: a key of ``DEVICE_CATALOGUE``, in any case.
        count: number of devices, at least 1.
        reserved_bytes: to keep free on each; ``None`` takes the catalogue's.
    Raises:
        ConfigError: the catalogue has no such device, or nothing of it is left.
    """
    key = name.lower()
    if key not in DEVICE_CATALOGUE:
        raise ConfigError(f"device {name!r} is not in the catalogue, which has {', '.join(DEVICE_CATALOGUE)}.")
    entry = DEVICE_CATALOGUE[key]
    reserved_bytes = entry.reserved_bytes if reserved_bytes is None else reserved_bytes
    return Topology(tuple(Device(f"{key}-{i}", entry.memory_bytes, reserved_bytes, "cuda") for i in range(count)))
