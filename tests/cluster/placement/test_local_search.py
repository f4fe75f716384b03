import numpy as np
import pytest
from placement_factories import even_start, layer_of

from cluster.placement.exact_search import solve_layer_exactly
from cluster.placement.layer_counts import LayerCounts
from cluster.placement.layer_problem import LayerProblem, layer_cost
from cluster.placement.local_search import improve_layer


def improved(problem: LayerProblem, num_shakes: int, seed: int = 0) -> np.ndarray:
    return improve_layer(problem, even_start(problem), num_shakes, np.random.default_rng(seed))


SMALL = [(1, 1, 1), (3, 5, 2), (8, 4, 2), (9, 3, 3), (12, 3, 2), (16, 2, 4)]


def test_shaking_finds_the_optimum_of_most_small_layers_and_comes_close_in_the_rest() -> None:
    gaps = []
    for num_experts, num_devices, top_k in SMALL:
        for seed in range(4):
            problem = layer_of(num_experts, num_devices, top_k, seed, num_tokens=60, has_costs=seed % 2 == 1)
            optimum = layer_cost(problem, solve_layer_exactly(problem))
            cost = layer_cost(problem, improved(problem, num_shakes=100))
            assert cost >= optimum - 1e-6
            gaps.append((cost - optimum) / max(1.0, optimum))
    assert max(gaps) < 0.02
    assert sum(gap > 1e-9 for gap in gaps) <= 2


@pytest.mark.parametrize(("num_experts", "num_devices"), [(7, 3), (33, 4), (5, 8)])
def test_no_single_move_or_swap_helps_further_and_limits_hold(num_experts: int, num_devices: int) -> None:
    problem = layer_of(num_experts, num_devices, seed=3)
    found = improved(problem, num_shakes=3)
    counts = LayerCounts(problem, found)
    for expert in range(num_experts):
        assert counts.move_gains(expert).max() <= 1e-6
        assert counts.swap_gains(expert).max() <= 1e-6
    assert (counts.counts <= problem.max_counts).all()
    assert layer_cost(problem, found) <= layer_cost(problem, even_start(problem))


def test_a_seed_repeats_its_placement() -> None:
    problem = layer_of(33, 4)
    assert improved(problem, 5, seed=7).tolist() == improved(problem, 5, seed=7).tolist()
