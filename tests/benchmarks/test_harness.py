import argparse
import json

import pytest

from benchmarks import harness
from benchmarks.harness import Report, add_arguments
from benchmarks.metrics import Metric, read_metrics
from moe_bitnet.errors import ConfigError


def parse(*options):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(options)


def test_json_lines_are_the_only_output(capsys):
    with Report("example", parse("--json")) as report:
        report.progress("the first figure")
        report.add("share", 0.9, "ratio", baseline="torch", baseline_value=2.0, detail={"threads": 2}, at_least=0.85)
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    metric = Metric.from_json_line(line)
    assert metric == report.metrics[0]
    assert (metric.metric, metric.goal, metric.detail["threads"]) == ("example.share", 0.85, 2)
    assert metric.machine["slug"]
    assert metric.versions["python"]
    assert "the first figure" in captured.err


def test_a_line_is_printed_as_soon_as_it_is_measured(capsys):
    report = Report("example", parse("--json"))
    report.add("share", 0.9, "ratio")
    assert json.loads(capsys.readouterr().out)["value"] == 0.9


def test_without_json_there_is_a_table(capsys):
    with Report("example", parse()) as report:
        report.add("share", 0.9, "ratio", at_most=1)
    text = capsys.readouterr().out
    assert "example.share" in text
    assert "≤ 1 ✓" in text


def test_the_file_holds_the_lines_too(tmp_path):
    path = tmp_path / "out.jsonl"
    with Report("example", parse("--output", str(path), "--quick")) as report:
        report.add("share", 0.9, "ratio")
    assert read_metrics(path) == report.metrics
    assert report.metrics[0].detail["is_quick"] is True


def test_output_without_a_name_goes_to_the_machine_s_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    with Report("example", parse("--output")) as report:
        report.add("share", 0.9, "ratio")
    assert read_metrics(tmp_path / report.machine.slug / "example.jsonl") == report.metrics


def test_a_quick_run_does_not_replace_committed_results():
    with pytest.raises(ConfigError, match="--quick"):
        Report("example", parse("--output", "--quick"))


def test_a_broken_run_replaces_no_file(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), Report("example", parse("--output", str(path))) as report:  # noqa: PT012
        report.add("share", 0.9, "ratio")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert "example.share" in capsys.readouterr().out
