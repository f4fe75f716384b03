import itertools

import numpy as np
import pytest
from placement_factories import layer_of

from cluster.placement.exact_search import num_steps, solve_layer_exactly
from cluster.placement.layer_problem import layer_cost


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("num_experts", "num_devices", "top_k", "spare"),
    [(1, 1, 1, 0), (1, 3, 1, 0), (4, 2, 2, 0), (5, 4, 2, 1), (7, 3, 3, 0), (6, 3, 2, 6)],
)
def test_no_placement_is_cheaper(num_experts: int, num_devices: int, top_k: int, spare: int, seed: int) -> None:
    problem = layer_of(num_experts, num_devices, top_k, seed, spare=spare, has_costs=seed > 0)
    cheapest = min(
        layer_cost(problem, np.array(devices))
        for devices in itertools.product(range(num_devices), repeat=num_experts)
        if (np.bincount(devices, minlength=num_devices) <= problem.max_counts).all()
    )
    found = solve_layer_exactly(problem)
    assert (np.bincount(found, minlength=num_devices) <= problem.max_counts).all()
    assert layer_cost(problem, found) == pytest.approx(cheapest, rel=1e-12)


def test_the_effort_is_known_beforehand() -> None:
    assert num_steps(layer_of(4, 2)) == 81
    assert num_steps(layer_of(4, 5)) == 3 * 81
