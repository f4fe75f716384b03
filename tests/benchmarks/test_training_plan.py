import dataclasses

import pytest

from benchmarks.training_plan import COMPARED, SEEDS, Cell, best_rate, plan, small_sweep, sweep_of

STEPS = 100


def losses_of(cells, best):
    """Make the given rate of each precision the best."""
    return {
        cell: 3.0 + abs(cell.peak_learning_rate - best[cell.precision]) * 10 for cell in cells if cell.num_steps >= 20
    }


BEST = {"ternary": 4e-3, "float": 2e-3, "int4-experts": 2e-3, "binary": 4e-3}


def test_only_the_first_sweep_is_known_at_the_start():
    assert plan({}, STEPS) == small_sweep({}, STEPS)


def test_a_precision_goes_on_when_its_own_sweep_is_finished():
    finished = losses_of([cell for cell in small_sweep({}, STEPS) if cell.precision == "ternary"], BEST)
    new = set(plan(finished, STEPS)) - set(small_sweep({}, STEPS))
    assert {cell.precision for cell in new} == {"ternary"}
    assert {cell.peak_learning_rate for cell in new if cell.size == "small"} == {4e-3}
    assert {cell.peak_learning_rate for cell in new if cell.size == "middle"} == {4e-3, 2e-3}


def test_the_whole_plan_has_every_size_precision_and_seed_at_its_best_rate():
    losses, cells = {}, plan({}, STEPS)
    while any(cell not in losses for cell in cells):
        losses = losses_of(cells, BEST)
        cells = plan(losses, STEPS)
    assert len(set(cells)) == len(cells)
    for precision in COMPARED:
        for size, seeds in SEEDS.items():
            rate = best_rate(losses, size, precision, STEPS)
            assert all(Cell("code", size, precision, rate, seed, STEPS) in cells for seed in seeds)
        rate = best_rate(losses, "small", precision, STEPS)
        assert all(Cell("prose", "small", precision, rate, seed, STEPS) in cells for seed in SEEDS["small"])


def test_the_best_rate_waits_for_the_whole_sweep():
    sweep = sweep_of({}, "small", "float", STEPS)
    losses = losses_of(sweep, BEST)
    assert best_rate(losses, "small", "float", STEPS) == 2e-3
    del losses[sweep[-1]]
    assert best_rate(losses, "small", "float", STEPS) is None
    assert sweep_of(losses, "middle", "float", STEPS) == []


def test_a_sweep_goes_on_until_the_best_rate_lies_between_others():
    best = {**BEST, "ternary": 0.9e-3}
    cells, lowest = small_sweep({}, STEPS), []
    for _ in range(3):
        cells = small_sweep(losses_of(cells, best), STEPS)
        lowest.append(min(cell.peak_learning_rate for cell in cells if cell.precision == "ternary"))
    assert lowest == [1e-3, 5e-4, 5e-4]
    assert best_rate(losses_of(cells, best), "small", "ternary", STEPS) == 1e-3


@pytest.mark.parametrize("change", [{"seed": 1}, {"peak_learning_rate": 1.0}, {"corpus": "prose"}, {"num_steps": 7}])
def test_cells_have_names_of_their_own(change):
    cell = small_sweep({}, STEPS)[0]
    assert dataclasses.replace(cell, **change).name != cell.name
