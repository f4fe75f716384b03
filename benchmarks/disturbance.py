"""How much CPU other processes used while something was measured.

The kernel counts the busy time of all cores in ``/proc/stat``, in ticks of 10 ms; what this
process and its descendants used is subtracted. Time that a hypervisor gave to others counts
as theirs. Where there is no ``/proc/stat`` the share is unknown, ``None``.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class CpuTimes:
    """CPU seconds since boot, over all cores.

    Attributes:
        busy_s: not idle, whoever used it.
        total_s: busy and idle.
        own_s: used by this process and its descendants.
    """

    busy_s: float
    total_s: float
    own_s: float


def read_cpu_times() -> CpuTimes | None:
    """Read the counters; ``None`` where the system has none."""
    try:
        first_line = _STAT.read_text(encoding="ascii").split("\n", 1)[0]
    except OSError:
        return None
    busy_s, total_s = parse_stat(first_line, os.sysconf("SC_CLK_TCK"))
    return CpuTimes(busy_s, total_s, _own_cpu_s())


def parse_stat(line: str, ticks_per_s: int) -> tuple[float, float]:
    """Return busy and total seconds of the ``cpu`` line of ``/proc/stat``.

    Args:
        line: ``cpu user nice system idle iowait irq softirq steal ...``; guest time, which follows, is part of user.
        ticks_per_s: the unit of the counters.
    """
    ticks = [int(word) for word in line.split()[1:9]]
    idle = sum(ticks[3:5])
    return (sum(ticks) - idle) / ticks_per_s, sum(ticks) / ticks_per_s


def other_cpu_share(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    """Return the share of all cores' time that other processes used between two readings.

    Returns:
        0 to 1; ``None`` if unknown. Over less than a few ticks it is coarse: measure 0.2 s or more.
    """
    if before is None or after is None or after.total_s <= before.total_s:
        return None
    others_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return min(1.0, max(0.0, others_s / (after.total_s - before.total_s)))


def _own_cpu_s() -> float:
    own = os.times()
    used_s = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:  # it ended between the listing and the look
            continue
        used_s += times.user + times.system + times.children_user + times.children_system
    return used_s
