import dataclasses

import pytest

from benchmarks.training_plan import COMPARED, SEEDS, TRAINED, Cell, best_rate, plan, precisions, sweep_of

STEPS = 100
BEST = {"ternary": 4e-3, "float": 2e-3, "int4-experts": 2e-3, "binary": 4e-3}
FIRST = [cell for precision in precisions(*TRAINED[0]) for cell in sweep_of({}, "code", "small", precision, STEPS)]


def losses_of(cells, best):
    """Make the given rate of each precision the best."""
    return {cell: 3.0 + abs(cell.peak_learning_rate - best[cell.precision]) * 10 for cell in cells}


def finish(best):
    """Finish a plan whose best rates are given; returns its losses."""
    losses, cells = {}, plan({}, STEPS)
    while any(cell not in losses for cell in cells):
        losses = losses_of(cells, best)
        cells = plan(losses, STEPS)
    assert len(set(cells)) == len(cells)
    return losses


def rates_of(losses, *model):
    return [cell.peak_learning_rate for cell in sweep_of(losses, *model, STEPS)]


def test_only_the_first_sweep_is_known_at_the_start():
    assert plan({}, STEPS) == FIRST


def test_a_precision_goes_on_when_its_own_sweep_is_finished():
    finished = losses_of([cell for cell in FIRST if cell.precision == "ternary"], BEST)
    new = set(plan(finished, STEPS)) - set(FIRST)
    assert {cell.precision for cell in new} == {"ternary"}
    rates = {size: {cell.peak_learning_rate for cell in new if cell.size == size} for size in SEEDS}
    assert rates == {"small": {2e-3, 4e-3, 8e-3}, "middle": {4e-3, 2e-3}, "large": set()}


def test_the_whole_plan_has_every_corpus_size_precision_and_seed_at_its_best_rate():
    losses = finish(BEST)
    for precision in COMPARED:
        for corpus, size in TRAINED:
            rate = best_rate(losses, corpus, size, precision, STEPS)
            assert rate == BEST[precision]
            assert all(Cell(corpus, size, precision, rate, seed, STEPS) in losses for seed in SEEDS[size])


def test_the_best_rate_waits_for_the_whole_sweep():
    losses = losses_of(FIRST, BEST)
    assert best_rate(losses, "code", "small", "float", STEPS) == 2e-3
    del losses[sweep_of({}, "code", "small", "float", STEPS)[-1]]
    assert best_rate(losses, "code", "small", "float", STEPS) is None
    assert sweep_of(losses, "code", "middle", "float", STEPS) == []
    assert sweep_of(losses, "prose", "small", "float", STEPS) == []


def test_a_sweep_goes_on_until_the_best_rate_lies_between_others():
    losses = finish({**BEST, "ternary": 0.9e-3})
    assert rates_of(losses, "code", "small", "ternary") == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert best_rate(losses, "code", "small", "ternary", STEPS) == 1e-3
    assert rates_of(finish({**BEST, "float": 8e-3}), "code", "small", "float") == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]


def test_a_larger_size_tries_no_rate_above_the_best_of_the_smaller_one():
    losses = finish(BEST)
    assert rates_of(losses, "code", "middle", "float") == [1e-3, 2e-3]
    assert rates_of(losses, "code", "large", "float") == [5e-4, 1e-3, 2e-3]


def test_a_sweep_at_a_larger_size_goes_down():
    small = losses_of(FIRST, BEST)
    losses = small | losses_of(sweep_of(small, "code", "middle", "ternary", STEPS), {"ternary": 1e-3})
    assert rates_of(losses, "code", "middle", "ternary") == [1e-3, 2e-3, 4e-3]


@pytest.mark.parametrize("change", [{"seed": 1}, {"peak_learning_rate": 1.0}, {"corpus": "prose"}, {"num_steps": 7}])
def test_cells_have_names_of_their_own(change):
    cell = FIRST[0]
    assert dataclasses.replace(cell, **change).name != cell.name
