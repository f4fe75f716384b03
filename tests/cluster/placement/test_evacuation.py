import pytest
from host_factories import place

from cluster.placement.evacuation import evacuate
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.topology import Device, Topology
from moe_bitnet.errors import PlacementError

FOUR = [[0, 1, 2, 3, [1, 2], [3, 1]], [3, 3, 0, [2, 3], 1, 0]]
"""Two layers of six experts on four devices."""


def names(problem):
    return [device.name for device in problem.topology.devices]


def devices_by_name(placement):
    """``[layer][expert]`` → names of the devices that hold it, in their order."""
    layers = placement.devices_of_expert
    return [[[placement.device_names[index] for index in copies] for copies in layer] for layer in layers]


@pytest.mark.parametrize("lost", [[1], [2], [3], [1, 2], [1, 3], [2, 3], [1, 2, 3], []], ids=str)
def test_only_experts_without_a_copy_move(lost):
    problem, before = place(FOUR, 4)
    lost_names = {names(problem)[index] for index in lost}
    after = evacuate(problem, before, lost_names)
    after.check(problem)
    assert list(after.device_names) == [name for name in names(problem) if name not in lost_names]
    for old_layer, new_layer in zip(devices_by_name(before), devices_by_name(after), strict=True):
        for old, new in zip(old_layer, new_layer, strict=True):
            kept = [name for name in old if name not in lost_names]
            assert new == kept if kept else len(new) == 1


def test_copies_keep_their_order():
    problem, before = place([[[1, 2, 3], [3, 0, 1]]], 4)
    after = evacuate(problem, before, [names(problem)[1]])
    left = names(problem)
    assert devices_by_name(after) == [[[left[2], left[3]], [left[3], left[0]]]]


def test_lost_experts_go_where_most_room_is_one_after_the_other():
    problem, before = place([[1, 1, 1, 2, 2, 3]], 4, expert_bytes=10, home_bytes=25, memory_bytes=100)
    after = evacuate(problem, before, [names(problem)[1]])
    # free: home 75, device 2 80, device 3 90; each expert takes 10, the first device wins a tie
    left = names(problem)
    assert devices_by_name(after)[0] == [[left[3]], [left[2]], [left[3]], [left[2]], [left[2]], [left[3]]]


def uneven(memory, devices_of_expert, expert_bytes, home_bytes=0):
    topology = Topology(tuple(Device(f"d{index}", each) for index, each in enumerate(memory)))
    problem = PlacementProblem(len(devices_of_expert), len(devices_of_expert[0]), expert_bytes, home_bytes, topology)
    return problem, Placement.for_problem(problem, names(problem), devices_of_expert)


def test_room_is_used_to_the_last_slot():
    problem, before = uneven([45, 40, 30], [[0, 1, 1, 2, 2]], expert_bytes=10, home_bytes=15)
    after = evacuate(problem, before, ["d1"])  # left: two slots on the home, one on d2
    after.check(problem)
    assert after.num_experts_per_device(0) == [3, 2]
    assert after.bytes_per_device == (45, 20)


def test_what_does_not_fit_is_refused_with_the_missing_bytes():
    problem, before = uneven([2000, 4000, 2999], [[0, 1, 1, 1, 1, 2]], expert_bytes=1000)
    message = "4 experts of 1 kB have lost their only copy, and d0, d2 have room for 2: 2 kB are missing"
    with pytest.raises(PlacementError, match=message):
        evacuate(problem, before, {"d1"})
    assert before.devices_of_expert == (((0,), (1,), (1,), (1,), (1,), (2,)),)


def test_slots_of_parts_of_experts_do_not_count():
    problem, before = uneven([19, 20, 19], [[0, 1, 1, 2]], expert_bytes=10)
    with pytest.raises(PlacementError, match="have room for 0"):
        evacuate(problem, before, ["d1"])


def test_a_home_fuller_than_experts_need_takes_none():
    problem, before = uneven([100, 20, 20], [[1, 2]], expert_bytes=10, home_bytes=95)
    after = evacuate(problem, before, ["d1"])
    assert devices_by_name(after) == [[["d2"], ["d2"]]]


@pytest.mark.parametrize("lost", [[0], [0, 1], [0, 1, 2, 3]], ids=str)
def test_the_home_cannot_be_left(lost):
    problem, before = place(FOUR, 4)
    with pytest.raises(PlacementError, match=f"the home '{names(problem)[0]}' cannot be left"):
        evacuate(problem, before, [names(problem)[index] for index in lost])


def test_a_device_that_is_not_in_the_plan_may_be_lost():
    problem, before = place(FOUR, 4)
    assert evacuate(problem, before, ["elsewhere"]) == before


def test_evacuations_follow_one_another():
    problem, plan = place(FOUR, 4)
    for index in (3, 1, 2):
        plan = evacuate(problem, plan, [names(problem)[index]])
        plan.check(problem)
    assert plan.device_names == (names(problem)[0],)
    assert all(copies == (0,) for layer in plan.devices_of_expert for copies in layer)
