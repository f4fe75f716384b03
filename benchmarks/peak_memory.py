"""Peak resident memory of a call, beyond what the process held before it."""

from collections.abc import Callable
from pathlib import Path

_CLEAR_PEAK = "5"  # Linux: resets VmHWM to the present resident size


def resident_bytes(field: str = "VmRSS") -> int:
    """Return ``VmRSS`` (now) or ``VmHWM`` (peak) of this process, from /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; it is known on Linux only.")


def peak_bytes_during(function: Callable[[], object]) -> int:
    """Call a function and return by how much resident memory rose above its level before, at most."""
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
    function()
    return max(0, resident_bytes("VmHWM") - before)
