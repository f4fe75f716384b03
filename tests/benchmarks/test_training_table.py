import dataclasses
import math

import pytest
import torch

from benchmarks.training_plan import Cell, model_config
from benchmarks.training_table import at_bytes, gather, ratio_to_twin, select
from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.checkpoint.stored_bytes import stored_bytes
from moe_bitnet.model import MoETransformer

STEPS = 10
EVEN, UNEVEN = [[0.125] * 8], [[0.0, 0.25] * 4]


def result(loss, load=EVEN, **more):
    return {"validation_loss": loss, "num_active_parameters": 1, "expert_load": load, **more}


def entries_of(losses, load=EVEN, corpus="code", **more):
    """Make entries of ``{(size, precision): losses by seed}``."""
    results = {
        Cell(corpus, size, precision, 0.01, seed, STEPS): result(loss, load, **more)
        for (size, precision), by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    }
    return gather(results, lambda *_: 0.01)


def test_seeds_are_gathered_at_the_best_rate_of_their_model_alone():
    rates = {("code", "small", "float"): 0.01, ("prose", "small", "float"): 0.02}
    best = Cell("code", "small", "float", 0.01, 0, STEPS)
    others = [dataclasses.replace(best, **change) for change in ({"peak_learning_rate": 0.02}, {"corpus": "prose"})]
    results = {best: result(2.0), **{cell: result(1.0) for cell in others}}
    (entry,) = gather(results, lambda *model: rates.get(model))
    assert entry.losses == (2.0,)


def test_ratios_compare_seed_with_seed():
    ternary, twin = (
        select(entries_of({("small", "ternary"): [2.0, 2.2], ("small", "float"): [1.9, 2.2, 9.0]}), precision)[0]
        for precision in ("ternary", "float")
    )
    assert ratio_to_twin(ternary, twin) == pytest.approx(math.exp(0.05))


def test_an_uneven_load_and_dead_experts_are_seen():
    (entry,) = entries_of({("small", "float"): [2.0]}, load=UNEVEN)
    assert entry.load_cv == (1.0,)
    assert entry.num_dead_experts == 4
    (entry,) = entries_of({("small", "float"): [2.0]})
    assert (entry.load_cv, entry.num_dead_experts) == ((0.0,), 0)


def test_equal_bytes_are_found_on_the_line_between_sizes():
    entries = entries_of({("small", "float"): [3.0], ("middle", "float"): [2.0]})
    low, high = (entry.stored_bytes for entry in entries)
    assert at_bytes(entries, round(math.sqrt(low * high))).perplexity == pytest.approx(math.exp(2.5), rel=1e-4)
    assert at_bytes(entries, low // 2).perplexity == pytest.approx(math.exp(3.0))
    assert "2.0 times the bytes" in at_bytes(entries, low // 2).how
    assert at_bytes(entries, high + 1) is None
    assert at_bytes([], low) is None


def test_bytes_are_those_of_packed_weights_and_16_bit_floats():
    twin = model_config("small", "float")
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in MoETransformer(twin).parameters())
    assert stored_bytes(twin) == 2 * num_parameters
    ternary, table = model_config("small", "ternary"), 2 * twin.vocab_size * twin.hidden_size
    packed = model_sizes(ternary, "base3").total_bytes - 2 * table  # the table has 32 bits there
    # norms, scales and routers have 16 bits here, too
    assert 0.9 * (packed + table) < stored_bytes(ternary) < packed + table
    assert stored_bytes(model_config("small", "binary")) < stored_bytes(ternary)
    experts = 3 * 128 * 192 * 8 * 4
    saved = stored_bytes(twin) - stored_bytes(model_config("small", "int4-experts"))
    assert saved == experts * (16 - 4.5) / 8
