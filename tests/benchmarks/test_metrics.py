import json

import pytest

from benchmarks.metrics import Metric, read_metrics, write_metrics
from moe_bitnet.errors import DataError


def example(**changes):
    fields = {
        "metric": "decode.overhead_share",
        "value": 0.04,
        "unit": "ratio",
        "baseline": "torch fp16",
        "baseline_value": 1.5,
        "detail": {"threads": 2, "shape": [1, 7], "at_most": 0.05},
        "machine": {"slug": "amd-epyc-zen5-2-cores"},
        "versions": {"torch": "2.13.0"},
        "commit": "abc1234",
    }
    return Metric(**{**fields, **changes})


def test_a_line_survives_the_round_trip():
    metric = example()
    line = metric.to_json_line()
    assert "\n" not in line
    assert Metric.from_json_line(line) == metric


def test_a_file_survives_the_round_trip(tmp_path):
    metrics = [example(), example(value=None, detail={})]
    path = tmp_path / "machine" / "decode.jsonl"
    write_metrics(metrics, path)
    assert read_metrics(path) == metrics


def test_a_line_has_the_fields_of_the_contract():
    assert list(json.loads(example().to_json_line())) == [
        "metric", "value", "unit", "baseline", "baseline_value", "detail", "machine", "versions", "commit",
    ]  # fmt: skip


def test_unknown_keys_are_ignored():
    line = json.dumps({"metric": "a.b", "value": 1, "unit": "s", "of_a_later_version": 3})
    assert Metric.from_json_line(line) == Metric("a.b", 1, "s")


@pytest.mark.parametrize(
    ("value", "detail", "reaches"),
    [
        (0.9, {"at_least": 0.85}, True),
        (0.8, {"at_least": 0.85}, False),
        (2.5, {"at_most": 2.5}, True),
        (2.6, {"at_most": 2.5}, False),
        (0.9, {}, None),
        (None, {"at_least": 0.85}, None),
    ],
)
def test_a_goal_is_reached_on_its_own_side(value, detail, reaches):
    assert example(value=value, detail=detail).reaches_goal is reaches


@pytest.mark.parametrize("field", ["value", "baseline_value"])
def test_numbers_that_json_cannot_hold_are_refused(field):
    with pytest.raises(DataError, match="finite"):
        example(**{field: float("nan")})


@pytest.mark.parametrize("text", ["not json", "[]", '{"metric": "a.b"}'])
def test_a_broken_line_is_named(tmp_path, text):
    path = tmp_path / "broken.jsonl"
    path.write_text(f"{example().to_json_line()}\n\n{text}\n")
    with pytest.raises(DataError, match=r"broken.jsonl:3"):
        read_metrics(path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent.jsonl"):
        read_metrics(tmp_path / "absent.jsonl")
