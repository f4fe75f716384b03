import json
import math

import numpy as np
import pytest
import torch

from cluster.placement.cost import routed_bytes
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.report import TransferSize, report_placement
from cluster.placement.solver import solve_placement
from cluster.routing.synthetic import clustered_trace, zipf_trace
from cluster.topology import logical_devices
from cluster.transport.row_format import Combine
from moe_bitnet.errors import PlacementError

FORMATS = [("int8", Combine("rows", "float32")), ("float16", Combine("partial_sums", "int8"))]
TRANSFER = TransferSize(bytes_per_visit=100, bytes_per_pair=2)


def placed(num_layers: int = 2, num_devices: int = 3) -> Placement:
    return solve_placement(PlacementProblem(num_layers, 12, 10, 5, logical_devices(4, 400)), num_devices=num_devices)


@pytest.mark.parametrize(("dispatch_row", "combine"), FORMATS)
def test_bytes_of_a_replay_are_those_counted_from_the_routing(dispatch_row: str, combine: Combine) -> None:
    placement, trace = placed(), clustered_trace(200, 2, 12, 3, num_topics=3)
    transfer = TransferSize.of_rows(33, dispatch_row, combine)  # type: ignore[arg-type]
    report = report_placement(placement, top_k=3, transfer=transfer, trace=trace)
    counted = [
        routed_bytes(torch.from_numpy(trace.layer(layer).astype(np.int64)), placement, layer, 33, dispatch_row, combine)  # type: ignore[arg-type]
        for layer in range(2)
    ]
    assert report.bytes_per_token == pytest.approx(sum(each.total_bytes for each in counted) / 200)


def test_uniform_routing_is_the_textbook_formula() -> None:
    report = report_placement(placed(), top_k=3, transfer=TRANSFER)
    unseen = math.comb(8, 3) / math.comb(12, 3)
    assert report.uniform_visits_per_token == pytest.approx(2 * 2 * (1 - unseen))
    assert report.uniform_bytes_per_token == pytest.approx(report.uniform_visits_per_token * 100 + 2 * 3 * 8 / 12 * 2)
    assert report.visits_per_token is report.imbalance is report.is_cap_reached is None
    assert report.summary() == "3 devices, bound 1; 306.2 B/token if routing is uniform"


def test_a_line_says_devices_bound_traffic_and_load() -> None:
    trace = clustered_trace(2000, 1, 12, 3, num_topics=3)
    problem = PlacementProblem(1, 12, 10, 5, logical_devices(4, 50))
    placement = solve_placement(problem, trace=trace)
    report = report_placement(placement, top_k=3, transfer=TRANSFER, trace=trace)
    assert (report.num_devices, report.device_bound) == (3, 3)
    assert report.bytes_per_token is not None
    assert report.bytes_per_token < report.uniform_bytes_per_token
    assert report.is_cap_reached
    assert report.summary().startswith(f"3 devices, bound 3; {report.bytes_per_token:.4g} B/token, uniform routing")
    assert report.summary().endswith(f"load up to {report.imbalance:.2f} of the mean")
    assert json.loads(json.dumps(report.to_dict()))["summary"] == report.summary()


def test_a_cap_out_of_reach_is_said_with_its_reason() -> None:
    trace = zipf_trace(500, 1, 12, 1, exponent=1.5)
    report = report_placement(placed(1), top_k=1, transfer=TRANSFER, trace=trace)
    assert report.is_cap_reached is False
    assert f"above the cap of 1.15 (one expert alone has {report.hottest_expert:.2f}" in report.summary()
    even = clustered_trace(500, 1, 12, 3, num_topics=3)
    crowded = Placement.for_problem(
        PlacementProblem(1, 12, 10, 5, logical_devices(2, 400)), ["device-0", "device-1"], [[0] * 10 + [1] * 2]
    )
    report = report_placement(crowded, top_k=3, transfer=TRANSFER, trace=even)
    assert "above the cap of 1.15 (memory" in report.summary()


def test_one_device_and_replicas_are_named() -> None:
    alone = report_placement(placed(2, 1), top_k=3, transfer=TRANSFER)
    assert alone.summary() == "1 device, bound 1; 0 B/token if routing is uniform"
    problem = PlacementProblem(1, 2, 10, 5, logical_devices(2, 400))
    copied = Placement.for_problem(problem, ["device-0", "device-1"], [[[0, 1], [1, 0]]])
    assert "2 devices, bound 1, 2 replicas;" in report_placement(copied, top_k=1, transfer=TRANSFER).summary()


def test_a_trace_of_another_top_k_is_refused() -> None:
    with pytest.raises(PlacementError, match="top 2, the model of top 3"):
        report_placement(placed(), top_k=3, transfer=TRANSFER, trace=clustered_trace(5, 2, 12, 2, num_topics=2))
