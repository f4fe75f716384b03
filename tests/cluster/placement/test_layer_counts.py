import numpy as np
import pytest
from placement_factories import even_start, layer_of

from cluster.placement.layer_counts import LayerCounts
from cluster.placement.layer_problem import layer_cost

SIZES = [(1, 1, 1), (7, 3, 2), (5, 8, 3), (33, 4, 5)]


@pytest.mark.parametrize(("num_experts", "num_devices", "top_k"), SIZES)
def test_gains_are_what_the_definition_says_after_any_number_of_moves(
    num_experts: int, num_devices: int, top_k: int
) -> None:
    problem = layer_of(num_experts, num_devices, top_k, has_costs=True, spare=num_experts)
    counts = LayerCounts(problem, even_start(problem))
    generator = np.random.default_rng(0)
    for _ in range(4):
        placed = counts.device_of_expert.copy()
        before = layer_cost(problem, placed)
        assert counts.cost() == pytest.approx(before, abs=1e-6)
        for expert in range(num_experts):
            moves, swaps = counts.move_gains(expert), counts.swap_gains(expert)
            assert moves[placed[expert]] == -np.inf
            for device in set(range(num_devices)) - {int(placed[expert])}:
                after = placed.copy()
                after[expert] = device
                assert before - moves[device] == pytest.approx(layer_cost(problem, after), abs=1e-6)
            for partner in range(num_experts):
                after = placed.copy()
                after[[expert, partner]] = placed[[partner, expert]]
                if placed[expert] == placed[partner]:
                    assert swaps[partner] == -np.inf
                else:
                    assert before - swaps[partner] == pytest.approx(layer_cost(problem, after), abs=1e-6)
        for _ in range(3):
            counts.move(int(generator.integers(num_experts)), int(generator.integers(num_devices)))


def test_a_full_device_takes_no_further_expert() -> None:
    problem = layer_of(6, 3, spare=0)
    counts = LayerCounts(problem, even_start(problem))
    assert all(np.isneginf(counts.move_gains(expert)).all() for expert in range(6))


def test_counts_and_loads_follow_a_new_placement() -> None:
    problem = layer_of(9, 3)
    counts = LayerCounts(problem, even_start(problem))
    target = np.array([2, 1, 0, 2, 1, 0, 2, 1, 0])
    counts.place(target)
    anew = LayerCounts(problem, target)
    assert counts.device_of_expert.tolist() == target.tolist()
    assert counts.counts.tolist() == anew.counts.tolist()
    assert counts.loads == pytest.approx(anew.loads)
    assert np.array_equal(counts.move_gains(4), anew.move_gains(4))
