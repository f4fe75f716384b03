import numpy as np
import pytest
from placement_factories import layer_of

from cluster.placement.exact_search import solve_layer_exactly
from cluster.placement.layer_problem import layer_cost
from cluster.placement.layer_solver import contiguous_start, solve_layer
from cluster.placement.layer_start import cluster_greedily

SIZES = [(1, 1, 1), (1, 4, 1), (7, 3, 2), (5, 8, 3), (33, 4, 5), (40, 16, 2)]


@pytest.mark.parametrize(("num_experts", "num_devices", "top_k"), SIZES)
@pytest.mark.parametrize("spare", [0, 2])
def test_starts_and_answers_fit_and_the_answer_is_the_cheapest(
    num_experts: int, num_devices: int, top_k: int, spare: int
) -> None:
    problem = layer_of(num_experts, num_devices, top_k, spare=spare)
    answer = solve_layer(problem, 1, np.random.default_rng(0))
    for devices in (cluster_greedily(problem), contiguous_start(problem), answer):
        assert devices.shape == (num_experts,)
        assert (np.bincount(devices, minlength=num_devices) <= problem.max_counts).all()
        assert layer_cost(problem, answer) <= layer_cost(problem, devices) + 1e-6


def test_starts_respect_uneven_room() -> None:
    problem = layer_of(9, 3)
    problem.max_counts[:] = [1, 7, 1]
    for devices in (cluster_greedily(problem), contiguous_start(problem)):
        assert np.bincount(devices, minlength=3).tolist() == [1, 7, 1]


def test_contiguous_ids_stay_together() -> None:
    assert contiguous_start(layer_of(7, 3)).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_experts_of_separate_groups_are_clustered() -> None:
    problem = layer_of(8, 2, top_k=2)
    pairs = np.array([[0, 5], [2, 7], [0, 7], [5, 2], [1, 3], [4, 6], [1, 6], [3, 4]])  # {0, 2, 5, 7} and {1, 3, 4, 6}
    problem.expert_indices[:] = np.tile(pairs, (5, 1))
    problem.expert_loads[:] = 10
    devices = cluster_greedily(problem)
    assert len(set(devices[[0, 2, 5, 7]])) == len(set(devices[[1, 3, 4, 6]])) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_experts", "num_devices"), [(8, 4), (13, 3), (16, 3)])
def test_few_experts_are_placed_at_the_optimum(num_experts: int, num_devices: int, seed: int) -> None:
    problem = layer_of(num_experts, num_devices, 3, seed, num_tokens=200, has_costs=True)
    optimum = layer_cost(problem, solve_layer_exactly(problem))
    assert layer_cost(problem, solve_layer(problem, 1, np.random.default_rng(seed))) == pytest.approx(optimum)
