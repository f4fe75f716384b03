from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement.spread import level_totals, spread_experts


def test_the_drawn_example_holds() -> None:
    assert level_totals([9, 9, 9], 8) == [3, 3, 2]
    assert spread_experts([9, 9, 9], num_layers=2, num_experts=4) == [[2, 1, 1], [1, 2, 1]]


def test_a_short_device_is_filled_and_the_others_share_the_rest() -> None:
    assert level_totals([2, 9, 9], 13) == [2, 6, 5]


def test_devices_beyond_the_experts_stay_empty() -> None:
    assert level_totals([5, 5, 0, 5], 2) == [1, 1, 0, 0]
    assert level_totals([0], 0) == [0]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 7), st.integers(1, 33))
def test_every_layer_is_complete_and_as_even_as_slots_permit(
    slots: list[int], num_layers: int, num_experts: int
) -> None:
    needed = num_layers * num_experts
    slots = [*slots, max(0, needed - sum(slots))]
    counts = spread_experts(slots, num_layers, num_experts)

    assert [sum(layer) for layer in counts] == [num_experts] * num_layers
    columns = list(zip(*counts, strict=True))
    assert all(sum(column) <= limit for column, limit in zip(columns, slots, strict=True))
    assert all(max(column) - min(column) <= 1 for column in columns)
    # no spread has a smaller fullest device: with at most m experts of a layer on each, too few would fit
    fullest = max(max(layer) for layer in counts)
    assert sum(min(limit, (fullest - 1) * num_layers) for limit in slots) < needed
    # devices that still have room differ by at most one in their totals, and none that is full holds more
    totals = [sum(column) for column in columns]
    roomy = [total for total, limit in zip(totals, slots, strict=True) if total < limit]
    assert not roomy or max(totals) - min(roomy) <= 1
