import numpy as np
import pytest

from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.traffic import measure_layer, measure_placement, route, visits_of_devices
from cluster.routing.trace import RoutingTrace
from cluster.topology import logical_devices
from moe_bitnet.errors import PlacementError

CHOICES = np.array([[0, 1], [1, 2], [2, 3], [3, 0]])


def test_a_replay_counts_visits_pairs_and_loads() -> None:
    traffic = measure_layer([[0], [1], [1], [2]], CHOICES, 3)
    assert traffic.visits_per_token == (1 + 1 + 2 + 1) / 4
    assert traffic.pairs_per_token == 6 / 4
    assert traffic.imbalance == 4 / (8 / 3)
    assert traffic.hottest_expert == 2 / (8 / 3)


def test_a_copy_at_home_saves_its_visits() -> None:
    traffic = measure_layer([[0], [1], [1, 0], [2]], CHOICES, 3)
    assert traffic.visits_per_token == (1 + 1 + 1 + 1) / 4
    assert traffic.pairs_per_token == 4 / 4


def test_a_token_counts_once_on_a_device() -> None:
    assert visits_of_devices(np.array([[0, 0, 1], [2, 1, 1]]), 4).tolist() == [1, 2, 1, 0]


def test_loads_of_earlier_blocks_steer_later_ones() -> None:
    devices = route([[1, 2]], np.zeros((1001, 1), int), 3)
    assert sorted(np.bincount(devices[:, 0], minlength=3).tolist()) == [0, 500, 501]


def test_a_placement_is_measured_layer_by_layer() -> None:
    topology = logical_devices(2, 100)
    problem = PlacementProblem(2, 4, 1, 0, topology)
    placement = Placement.for_problem(problem, ["device-0", "device-1"], [[0, 0, 0, 0], [1, 1, 1, 1]])
    trace = RoutingTrace(np.stack([CHOICES, CHOICES], axis=1), 4)
    home, away = measure_placement(placement, trace)
    assert (home.visits_per_token, home.imbalance) == (0.0, 2.0)
    assert (away.visits_per_token, away.pairs_per_token) == (1.0, 2.0)
    with pytest.raises(PlacementError, match="1 layers of 4 experts, the model 2"):
        measure_placement(placement, trace.for_layers([0]))
