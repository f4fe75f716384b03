import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement.bound import device_lower_bound, martello_toth_bound
from cluster.placement.problem import PlacementProblem
from cluster.placement.solver import solve_placement
from cluster.topology import Device, Topology, logical_devices
from moe_bitnet.errors import PlacementError


def fewest_bins(capacity: int, sizes: list[int]) -> int:
    """Try all ways to share the pieces out."""
    for num_bins in itertools.count(1):
        for bins in itertools.product(range(num_bins), repeat=len(sizes)):
            if all(sum(s for s, b in zip(sizes, bins, strict=True) if b == one) <= capacity for one in range(num_bins)):
                return num_bins
    raise AssertionError


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=5))
def test_large_pieces_never_claim_too_many_bins_and_at_least_their_sum(sizes: list[int]) -> None:
    bound = martello_toth_bound(10, [(size, 1) for size in sizes])
    assert -(-sum(sizes) // 10) <= bound <= fewest_bins(10, sizes)


def test_large_pieces_do_not_share() -> None:
    assert martello_toth_bound(10, [(6, 3)]) == 3  # 18 bytes would pour into 2
    assert martello_toth_bound(10, [(7, 2), (4, 2)]) == 3  # 22 bytes pour into 3, but 4 finds no room beside 7
    assert martello_toth_bound(10, [(7, 3), (4, 1)]) == 4  # 25 bytes would pour into 3
    assert martello_toth_bound(10, []) == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 20))
def test_the_bound_is_at_most_what_the_solver_needs_and_mostly_equal(
    sizes: list[int], num_experts: int, expert_bytes: int, home_bytes: int
) -> None:
    topology = Topology(tuple(Device(f"d{i}", size) for i, size in enumerate(sizes)))
    problem = PlacementProblem(1, num_experts, expert_bytes, home_bytes, topology)
    try:
        placement = solve_placement(problem)
    except PlacementError:
        return
    assert placement.lower_bound <= placement.num_devices
    if len(set(sizes)) == 1:
        assert placement.lower_bound == placement.num_devices


def test_a_home_that_leaves_no_room_for_an_expert_counts_by_itself() -> None:
    # 550 bytes would pour into 6 devices of 100; two experts fit on one, none beside the home part
    problem = PlacementProblem(1, 12, 40, 70, logical_devices(9, 100))
    assert device_lower_bound(problem) == 7
    # whole experts: 9 of 40 need 5 devices of 100, 360 bytes would pour into 4
    assert device_lower_bound(PlacementProblem(1, 9, 40, 0, logical_devices(9, 100))) == 5


@pytest.mark.parametrize(
    ("num_experts", "home_bytes", "expected"), [(5, 0, 1), (5, 1, 2), (9, 0, 3), (9, 1, 4), (19, 1, 6)]
)
def test_unequal_devices_are_filled_largest_first(num_experts: int, home_bytes: int, expected: int) -> None:
    unequal = Topology((Device("a", 10), Device("b", 50), Device("c", 30)))
    assert device_lower_bound(PlacementProblem(1, num_experts, 10, home_bytes, unequal)) == expected
