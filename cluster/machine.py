"""What tells one machine from another for the data path."""

import os
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def machine_id() -> str:
    """Name this machine as its processes see it: two processes with the same name can meet at a Unix socket.

    Made of the boot, the user, and the network and file system namespaces, so that containers on one machine differ.
    """
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
        spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "mnt")]
    except OSError:  # not Linux
        boot, spaces = os.uname().nodename, []
    return ":".join([boot, str(os.getuid()), *spaces])
