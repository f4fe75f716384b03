import numpy as np
import pytest
from placement_factories import layer_of

from cluster.placement.layer_problem import layer_cost


@pytest.mark.parametrize(("num_experts", "num_devices", "top_k"), [(1, 1, 1), (7, 3, 2), (5, 8, 3), (33, 4, 5)])
def test_the_cost_is_that_of_walking_through_the_tokens(num_experts: int, num_devices: int, top_k: int) -> None:
    problem = layer_of(num_experts, num_devices, top_k, has_costs=True)
    device_of_expert = np.random.default_rng(1).integers(0, num_devices, num_experts)
    traffic, loads = 0.0, [0.0] * num_devices
    for row in problem.expert_indices.tolist():
        traffic += sum(problem.visit_costs[device] for device in {int(device_of_expert[expert]) for expert in row})
        for expert in row:
            loads[device_of_expert[expert]] += 1
    moving = sum(problem.expert_costs[expert, device] for expert, device in enumerate(device_of_expert))
    overload = sum(max(0.0, load - problem.load_cap) for load in loads)
    expected = traffic + moving + problem.overload_cost * overload
    assert layer_cost(problem, device_of_expert) == pytest.approx(expected, rel=1e-12)


def test_all_at_home_costs_overload_alone() -> None:
    problem = layer_of(6, 3)
    home = np.zeros(6, dtype=int)
    assert layer_cost(problem, home) == pytest.approx(problem.overload_cost * (80 - problem.load_cap))
