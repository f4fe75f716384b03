import numpy as np
import pytest
from placement_factories import choices_of, layer_of

from cluster.placement.replicas import LARGEST_SHARE, add_copies_against_traffic, replay_cost, split_hot_experts
from cluster.placement.traffic import route


def hot_layer(num_experts=12, num_devices=4, spare=2):
    """Expert 0 is in every token; the others are even."""
    problem = layer_of(num_experts, num_devices, 2, num_tokens=400, spare=spare)
    others = choices_of(400, num_experts - 1, 1, skew=0.0) + 1
    problem.expert_indices[:] = np.concatenate([np.zeros((400, 1), int), others], axis=1)
    problem.expert_loads[:] = np.bincount(problem.expert_indices.ravel(), minlength=num_experts)
    return problem


def test_hot_experts_are_split_until_their_copies_are_small_or_room_ends() -> None:
    problem = hot_layer(spare=1)  # room for 16 copies of 12 experts, expert 0 carries half of all load
    split = split_hot_experts(problem)
    assert np.bincount(split.expert_of_copy).tolist() == [3] + [1] * 11  # away from home there are 3 devices
    assert split.problem.expert_loads.sum() == pytest.approx(problem.expert_loads.sum())
    visits = np.bincount(split.problem.expert_indices.ravel(), minlength=14)
    assert np.ptp(visits[:3]) <= 1  # tokens take the copies in turn
    assert np.array_equal(split.expert_of_copy[split.problem.expert_indices], problem.expert_indices)
    assert (split.problem.expert_costs[:3, 0] > 0).all()  # not at home, where one copy would draw every token
    even = layer_of(12, 2, num_tokens=2000)
    even.expert_loads[:] = 1.0
    assert even.expert_loads.max() < LARGEST_SHARE * even.expert_loads.sum() / 2
    assert len(split_hot_experts(even).expert_of_copy) == 12


def test_no_room_means_no_copies() -> None:
    problem = hot_layer(spare=0)
    assert len(split_hot_experts(problem).expert_of_copy) == 12
    copies = [[expert % 4] for expert in range(12)]
    assert add_copies_against_traffic(problem, copies) == copies


def test_copies_that_meet_on_a_device_are_one() -> None:
    split = split_hot_experts(hot_layer(spare=1))
    assert split.fold(np.array([2, 1, 2, *range(11)]) % 4)[:2] == [[2, 1], [0]]


@pytest.mark.parametrize("seed", range(3))
def test_copies_against_traffic_stay_in_the_room_and_make_a_replay_cheaper(seed: int) -> None:
    problem = layer_of(12, 3, 3, seed, num_tokens=500, spare=2, max_imbalance=1.5)
    copies = [[expert % 3] for expert in range(12)]
    more = add_copies_against_traffic(problem, copies)
    assert [devices[0] for devices in more] == [devices[0] for devices in copies]
    assert all(len(set(devices)) == len(devices) for devices in more)
    counts = np.bincount([device for devices in more for device in devices], minlength=3)
    assert (counts <= problem.max_counts).all()
    assert counts.sum() > 12
    before, after = (replay_cost(problem, route(each, problem.expert_indices, 3)) for each in (copies, more))
    assert after < before
