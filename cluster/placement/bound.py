"""The fewest devices that any placement could need; the largest of three bounds.

- **Bytes** (L1 of Martello and Toth 1990, "Knapsack Problems", chapter 8): experts and home part are a liquid, poured
  into the largest devices first. For equal devices ``ceil(sum / C)``.
- **Whole experts**: a device of C bytes holds ``floor(C / expert)`` of them, and beside the home part fewer; how many
  fewer differs between devices by rounding, and the least is taken.
- **Large pieces** (L2, the same chapter, if all devices were as large as the largest): two pieces above C / 2 never
  share a device, and what is too large to join a piece above C / 2 finds no room beside it.

None exceeds the true minimum. Which is largest depends on the sizes: bytes for small experts on unequal devices,
whole experts where they leave gaps. For experts of one size the third adds little to the second.
"""

from collections.abc import Sequence

from cluster.placement.problem import PlacementProblem


def device_lower_bound(problem: PlacementProblem) -> int:
    """Return a number of devices below which no placement can go, home bytes included.

    If all devices together are too small, further devices of the largest size are counted.
    """
    usable = [device.usable_bytes for device in problem.topology.devices]
    bounds = [_fewest_of(usable, problem.total_bytes)]
    if problem.expert_bytes <= max(usable):
        slots = [size // problem.expert_bytes for size in usable]
        bounds.append(_fewest_of(slots, problem.total_experts + _slots_lost_to_home(problem)))
    pieces = ((problem.expert_bytes, problem.total_experts), (problem.home_bytes, 1))
    bounds.append(martello_toth_bound(max(usable), [(size, count) for size, count in pieces if size]))
    return max(bounds)


def martello_toth_bound(capacity: int, pieces: Sequence[tuple[int, int]]) -> int:
    """Return the bound L2 on the bins of one capacity that pieces need.

    For a threshold a up to half the capacity: pieces above ``capacity - a`` are alone, of those above half no two
    share a bin, and the pieces from a to half fill the space that the latter leave, then further bins. The
    bound is the largest over the thresholds that are a piece's size, or 0.

    Args:
        capacity: of each bin, at least every piece's size.
        pieces: sizes and how many there are of each.
    """
    thresholds = {0, *(size for size, _ in pieces if 2 * size <= capacity)}
    best = 0
    for threshold in thresholds:
        alone = sum(count for size, count in pieces if size > capacity - threshold)
        halves = [(size, count) for size, count in pieces if capacity - threshold >= size and 2 * size > capacity]
        num_halves = sum(count for _, count in halves)
        space = num_halves * capacity - sum(size * count for size, count in halves)
        small = sum(size * count for size, count in pieces if threshold <= size and 2 * size <= capacity)
        best = max(best, alone + num_halves + max(0, -(-(small - space) // capacity)))
    return best


def _slots_lost_to_home(problem: PlacementProblem) -> int:
    devices = [device for device in problem.topology.devices if device.usable_bytes >= problem.home_bytes]
    return min((problem.slots_on(device) - problem.slots_on(device, is_home=True) for device in devices), default=0)


def _fewest_of(sizes: Sequence[int], amount: int) -> int:
    """Return how many of the largest sizes sum to ``amount``; if all do not, more of the largest are counted."""
    for count, size in enumerate(sorted(sizes, reverse=True), start=1):
        amount -= size
        if amount <= 0:
            return count
    return len(sizes) + -(-amount // max(sizes))
