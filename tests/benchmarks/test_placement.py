import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks import placement
from benchmarks.harness import Report
from benchmarks.placement import judge, measure_devices, measure_optimum, problem_of
from benchmarks.placement_plot import plot_placement
from cluster.placement.placement import Placement
from cluster.placement.solver import solve_placement
from cluster.routing.synthetic import clustered_trace
from cluster.routing.trace import RoutingTrace
from moe_bitnet.errors import DataError


def solve_contiguously(problem, *, num_devices, **_goal):
    return solve_placement(problem, num_devices=num_devices)


def quick_report():
    return Report("placement", argparse.Namespace(quick=True, json=False, output=None))


def test_visits_leave_the_home_out_and_distinct_devices_count_it():
    trace = RoutingTrace(np.array([[[0, 1]], [[1, 2]], [[2, 3]], [[0, 3]]]), 4)
    problem = problem_of(trace, 2)
    figures = judge(Placement.for_problem(problem, ["device-0", "device-1"], [[0, 0, 1, 1]]), trace)
    assert (figures.visits, figures.distinct_devices, figures.imbalance) == (3 / 4, 6 / 4, 1.0)


@pytest.mark.parametrize(("num_devices", "spare", "slots"), [(2, 0, 14), (3, 1, 12)])
def test_devices_have_room_for_an_even_share_and_what_is_spare(num_devices, spare, slots):
    problem = problem_of(clustered_trace(2, 2, 14, 2, num_topics=2), num_devices, spare)
    assert [problem.slots_on(device) for device in problem.topology.devices] == [slots] * num_devices


def test_no_catalogue_shape_needs_more_devices_than_its_bound():
    report = quick_report()
    measure_devices(report)
    (metric,) = report.metrics
    assert metric.reaches_goal
    devices = metric.detail["table"]["devices"]
    assert [devices[f"mixtral-8x7b {bits} 20 GB"] for bits in ("16", "2bit", "base3")] == [5, 1, 1]
    assert [devices[f"deepseek-v3 {bits} 75 GB"] for bits in ("16", "2bit", "base3")] == [18, 3, 2]


def test_traffic_is_measured_on_the_other_half_and_drawn(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(placement, "NUM_TOKENS", 800)
    monkeypatch.setattr(placement, "solve_placement", solve_contiguously)
    report = quick_report()
    placement.measure_traffic(report, 1, (2, 4))
    ratios = [metric.value for metric in report.metrics if metric.unit == "ratio" and "vs" in metric.metric]
    assert ratios == [1.0] * 4  # contiguous against itself
    plot_placement(report.metrics, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    with pytest.raises(DataError, match="Give others"):
        plot_placement([], tmp_path / "q.png")


def test_small_layers_are_solved_to_the_optimum(monkeypatch):
    monkeypatch.setattr(placement, "MAX_EXPERTS", 9)
    report = quick_report()
    measure_optimum(report, num_seeds=1)
    gap, local_gap = report.metrics
    assert gap.reaches_goal
    assert local_gap.value is not None
    assert local_gap.value >= 0
