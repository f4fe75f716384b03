"""The fewest devices that any placement could need, by bytes alone.

Experts are taken as a liquid that can be cut anywhere, and poured into the largest
devices first. For equal devices this is ``ceil(sum / C)``, the bound called L1 by
Martello and Toth 1990, "Knapsack Problems", chapter 8. It never exceeds the true
minimum, and lies below it where whole experts leave gaps.
"""

from cluster.placement.problem import PlacementProblem


def device_lower_bound(problem: PlacementProblem) -> int:
    """Return a number of devices below which no placement can go, home bytes included.

    If all devices together are too small, further devices of the largest size are counted.
    """
    missing_bytes = problem.total_bytes
    usable = sorted((device.usable_bytes for device in problem.topology.devices), reverse=True)
    for count, usable_bytes in enumerate(usable, start=1):
        missing_bytes -= usable_bytes
        if missing_bytes <= 0:
            return count
    return len(usable) + -(-missing_bytes // usable[0])
