import json
import subprocess
import sys

import pytest


def run_quick(name):
    """Return the metrics of a benchmark's quick form by name, each a list of lines."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json"]
    lines = [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]
    assert all(line["detail"]["is_quick"] for line in lines)
    prefix, metrics = f"{name}.", {}
    for line in lines:
        metrics.setdefault(line["metric"].removeprefix(prefix), []).append(line)
    return metrics


def test_training_quality():
    metrics = run_quick("training_quality")
    trained = {(line["detail"]["size"], line["detail"]["precision"]) for line in metrics["validation_ppl"]}
    assert trained == {
        (size, precision) for size in ("quick", "quick-wide") for precision in ("ternary", "float", "int4-experts")
    }
    assert all(20 < line["value"] < 2000 for line in metrics["validation_ppl"])  # 2048 tokens: it learned something
    assert [line["detail"]["size"] for line in metrics["ppl_vs_twin"]] == ["quick", "quick-wide"]
    assert len(metrics["rounded_after_training_vs_twin"]) == 2
    assert metrics["ppl_vs_equal_bytes"]


def test_training_speed():
    metrics = run_quick("training_speed")
    assert [line["detail"]["precision"] for line in metrics["tokens_per_cpu_s"]] == ["ternary", "float"]
    assert all(line["value"] > 0 for line in metrics["tokens_per_cpu_s"])
    assert len(metrics["ternary_vs_twin_step"]) == len(metrics["ep_vs_dp_step"]) == 1
    assert metrics["dispatch_bytes_vs_formula"][0]["value"] == pytest.approx(1, abs=0.02)
