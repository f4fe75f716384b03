"""What tells one machine from another: for its memory, and for the data path."""

import os
import platform
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Name this machine: equal for processes that share one RAM, whatever containers or namespaces they are in.

    The kernel's boot id, or the machine's name where there is none.
    """
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return platform.node()


def machine_id() -> str:
    """Name this machine as its processes see it: two processes with the same name can meet at a Unix socket.

    Made of the boot, the user, and the network and file system namespaces, so that containers on one machine differ.
    """
    try:
        spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "mnt")]
    except OSError:  # not Linux
        spaces = []
    return ":".join([boot_id(), str(os.getuid()), *spaces])
