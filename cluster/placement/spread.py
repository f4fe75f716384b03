"""How many experts of each layer go on each device, as evenly as slots permit.

First the totals over all layers are levelled like water under lids: every device
gets the same number, except those whose slots end earlier. Then each total is cut
into layers that differ by at most one; the leftover ones are laid one after another
around the ring of layers, so every layer gets exactly its experts:

    3 devices, 2 layers, 4 experts a layer; totals 3 3 2 = 2·(1 1 1) + leftovers 1 1 0
                 device 0   device 1   device 2
    layer 0        1 + 1       1          1          the first leftover goes to layer 0,
    layer 1        1           1 + 1      1          the next to layer 1

Layers run one after another, so the fullest device of a layer sets its time. Its
number of experts is the smallest possible: with at most m experts of each layer on a
device, device d takes at most min(slots_d, m·L), and the water level is the least
at which those sum to all experts.
"""

from collections.abc import Sequence


def spread_experts(slots: Sequence[int], num_layers: int, num_experts: int) -> list[list[int]]:
    """Share out the experts of every layer.

    Args:
        slots: experts that each device can hold, all layers together; they must suffice.
        num_layers: L.
        num_experts: E, experts of each layer.
    Returns:
        ``[num_layers][num_devices]`` counts: rows sum to ``num_experts``, columns to at most the slots.
    """
    totals = level_totals(slots, num_layers * num_experts)
    counts = [[total // num_layers for total in totals] for _ in range(num_layers)]
    layer_index = 0
    for device_index, total in enumerate(totals):
        for _ in range(total % num_layers):
            counts[layer_index][device_index] += 1
            layer_index = (layer_index + 1) % num_layers
    return counts


def level_totals(slots: Sequence[int], num_items: int) -> list[int]:
    """Share ``num_items`` out under the lids ``slots``, with the least possible largest share.

    Args:
        slots: the most that each device can take.
        num_items: at most the sum of ``slots``.
    Returns:
        One share for each device; where one is left over, the earlier device gets it.
    """
    assert num_items <= sum(slots), (num_items, slots)
    low, high = 0, max(slots)
    while low < high:
        middle = (low + high) // 2
        if sum(min(limit, middle) for limit in slots) >= num_items:
            high = middle
        else:
            low = middle + 1
    totals = [min(limit, low) for limit in slots]
    excess = sum(totals) - num_items
    for device_index in reversed(range(len(totals))):
        if excess and totals[device_index] == low:
            totals[device_index] -= 1
            excess -= 1
    return totals
