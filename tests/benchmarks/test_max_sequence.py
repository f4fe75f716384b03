import argparse

import pytest

from benchmarks import max_sequence
from benchmarks.capacity_plot import plot_capacity
from benchmarks.harness import Report
from benchmarks.sequence_fill import FILLS, fill_cache
from benchmarks.sequence_models import SUBJECTS, ShapeSubject
from kvcache.memory import max_tokens
from moe_bitnet.cli.planning.memory_plan import CACHE_FORMATS
from moe_bitnet.cli.planning.model_shape import ModelShape
from moe_bitnet.errors import DataError

TINY = ModelShape(
    vocab_size=10, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=8
)


def report(is_quick=False):
    return Report("max_sequence", argparse.Namespace(quick=is_quick, json=False, output=None))


@pytest.mark.parametrize("fill", FILLS)
def test_a_cache_is_filled_to_its_last_token(fill):
    subject = ShapeSubject(TINY)
    result = fill_cache(subject, "K4V4", 300_000, fill)
    assert result["tokens"] == max_tokens(subject.cache_config(4, 4), 300_000) > 512
    assert result["allocated_bytes"] <= 300_000
    assert result["fill_s"] > 0 < result["decode_token_s"]


def test_multiples_compare_tokens_a_byte_of_peak(monkeypatch, tmp_path):
    tokens = {"FP16": 1000, "K8V8": 1900, "K4V4": 3800, "K2V2": 7600}

    def fill(case, name):
        same = {"allocated_bytes": 900, "effective_bits": 4.0, "fill_s": 1.0, "decode_token_s": 1.0, "threads": 1}
        return {"tokens": tokens[name], "peak_bytes": 1000 if name == "FP16" else 1900, "weights": "none", **same}

    monkeypatch.setattr(max_sequence, "_fill", fill)
    measured = report()
    for budget_mib in (1, 2):
        max_sequence.measure(measured, max_sequence.Case("tiny", budget_mib, "stored", tuple(tokens)))
    multiples = [metric for metric in measured.metrics if metric.metric == "max_sequence.multiple"]
    assert [metric.value for metric in multiples] == pytest.approx([1, 2, 4] * 2)
    assert [metric.goal for metric in multiples] == list(max_sequence.GOALS.values()) * 2
    assert multiples[0].detail["tokens_multiple"] == 1.9
    plot_capacity(measured.metrics, tmp_path / "capacity.png")
    assert (tmp_path / "capacity.png").stat().st_size > 1000
    with pytest.raises(DataError, match="Give others"):
        plot_capacity(multiples, tmp_path / "nothing.png")


def test_every_case_can_be_run():
    for case in (*max_sequence.CASES, *max_sequence.QUICK_CASES):
        assert case.model in SUBJECTS
        assert case.fill in FILLS
        assert case.formats[0] == max_sequence.BASELINE
        assert set(case.formats) <= CACHE_FORMATS.keys()
