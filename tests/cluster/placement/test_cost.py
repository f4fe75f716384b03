import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement.cost import (
    bytes_per_token,
    copies_per_token,
    expected_bytes_per_token,
    routed_bytes,
)
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.solver import solve_placement
from cluster.topology import logical_devices
from cluster.transport.frames import DispatchFrame, metadata_bytes, payload_bytes
from cluster.transport.row_format import Combine, CombineMode, RowFormat, row_bytes
from moe_bitnet.errors import ConfigError, ShapeError


def placement_of(device_of_expert: list[list[int]], num_devices: int) -> Placement:
    topology = logical_devices(num_devices, 10**6)
    problem = PlacementProblem(len(device_of_expert), len(device_of_expert[0]), 1, 0, topology)
    return Placement.for_problem(problem, [device.name for device in topology.devices], device_of_expert)


def test_rows_weigh_what_the_formats_say() -> None:
    assert [row_bytes(33, row_format) for row_format in ("float32", "float16", "bfloat16", "int8")] == [
        132,
        66,
        66,
        37,
    ]
    with pytest.raises(ConfigError, match="float64"):
        row_bytes(33, "float64")  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_experts", "top_k", "num_devices"), [(64, 8, 2), (128, 8, 8), (256, 8, 32), (8, 2, 8)])
def test_equal_devices_give_the_textbook_formulas(num_experts: int, top_k: int, num_devices: int) -> None:
    share = num_experts // num_devices
    counts = [share] * num_devices
    unseen = math.comb(num_experts - share, top_k) / math.comb(num_experts, top_k)
    assert copies_per_token(counts, top_k, has_dedup=False) == pytest.approx(top_k * (num_devices - 1) / num_devices)
    assert copies_per_token(counts, top_k, has_dedup=True) == pytest.approx((num_devices - 1) * (1 - unseen))


@pytest.mark.parametrize(
    ("dispatch_row", "has_dedup", "combine", "measured_bytes"),
    [
        ("float16", False, Combine("rows", "float16"), 32754),
        ("float16", True, Combine("partial_sums", "float16"), 8234),
        ("int8", True, Combine("partial_sums", "float16"), 6197),
        ("int8", True, Combine("partial_sums", "int8"), 4127),
    ],
)
def test_prediction_is_within_the_models_error_of_what_was_measured(
    dispatch_row: RowFormat, has_dedup: bool, combine: Combine, measured_bytes: int
) -> None:
    # bytes a token and layer between two hosts with 64 experts, top-8, hidden size 2048, partial sums where
    # deduplicated, counted at the link; that protocol spent 12 bytes on a (token, expert) pair, ours spends less
    traffic = bytes_per_token([32, 32], 8, 2048, dispatch_row, combine, has_dedup)
    pairs = copies_per_token([32, 32], 8, has_dedup=False)
    assert traffic.total_bytes - traffic.metadata_bytes + 12 * pairs == pytest.approx(measured_bytes, rel=0.006)
    assert traffic.metadata_bytes < 12 * pairs


def test_one_device_costs_nothing() -> None:
    placement = solve_placement(PlacementProblem(3, 7, 10, 5, logical_devices(2, 1000)))
    assert placement.num_devices == 1
    assert expected_bytes_per_token(placement, 2, 33, "float32", Combine()).total_bytes == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=7),
    st.integers(1, 3),
    st.sampled_from([True, False]),
    st.sampled_from(["rows", "partial_sums"]),
)
def test_expectation_is_the_mean_over_all_routings(
    devices: list[int], top_k: int, has_dedup: bool, mode: CombineMode
) -> None:
    top_k = min(top_k, len(devices))
    combine = Combine(mode, "float32")
    placement = placement_of([devices], 3)
    every_routing = torch.tensor(list(itertools.combinations(range(len(devices)), top_k)))
    counted = routed_bytes(every_routing, placement, 0, 33, "int8", combine, has_dedup)
    expected = expected_bytes_per_token(placement, top_k, 33, "int8", combine, has_dedup)
    for name in ("dispatch_payload_bytes", "combine_payload_bytes", "metadata_bytes", "total_bytes"):
        assert getattr(counted, name) / len(every_routing) == pytest.approx(getattr(expected, name))


def test_layers_add_up() -> None:
    placement = placement_of([[0, 0, 1], [0, 1, 1]], 2)
    layers = [bytes_per_token(counts, 2, 7, "float16", Combine()) for counts in ([2, 1], [1, 2])]
    total = expected_bytes_per_token(placement, 2, 7, "float16", Combine())
    assert total.total_bytes == pytest.approx(sum(layer.total_bytes for layer in layers))


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 33])
@pytest.mark.parametrize("has_dedup", [True, False])
@pytest.mark.parametrize("mode", ["rows", "partial_sums"])
def test_counted_bytes_are_those_of_the_frames(num_tokens: int, has_dedup: bool, mode: CombineMode) -> None:
    combine = Combine(mode, "float16")
    generator = torch.Generator().manual_seed(num_tokens)
    placement = solve_placement(PlacementProblem(2, 7, 10, 5, logical_devices(3, 1000)), num_devices=3)
    expert_indices = torch.rand(num_tokens, 7, generator=generator).argsort(dim=1)[:, :3]
    payload = metadata = num_answer_rows = 0
    for device_index in (1, 2):
        here = set(placement.expert_ids_on(device_index, 1))
        chosen = [[expert_id for expert_id in row if expert_id in here] for row in expert_indices.tolist()]
        rows = [row for row in chosen if row] if has_dedup else [[expert_id] for row in chosen for expert_id in row]
        expert_ids = torch.tensor([expert_id for row in rows for expert_id in row], dtype=torch.int64)
        frame = DispatchFrame(
            layer_index=1,
            epoch=0,
            rows=torch.zeros(len(rows), 5, dtype=torch.int8),
            scales=torch.ones(len(rows), 1),
            expert_ids=expert_ids,
            pairs_per_row=torch.tensor([len(row) for row in rows], dtype=torch.int64),
            expert_weights=torch.ones(len(expert_ids)) if mode == "partial_sums" else None,
            combine=combine,
        )
        payload += payload_bytes(frame)
        metadata += metadata_bytes(frame)
        num_answer_rows += frame.num_answer_rows
    counted = routed_bytes(expert_indices, placement, 1, 5, "int8", combine, has_dedup)
    assert counted.dispatch_payload_bytes == payload
    assert counted.metadata_bytes == metadata
    assert counted.combine_payload_bytes == num_answer_rows * 10
    assert isinstance(counted.total_bytes, int)


def test_impossible_questions_are_refused() -> None:
    placement = placement_of([[0, 1]], 2)
    for top_k in (0, 3):
        with pytest.raises(ConfigError, match="top_k"):
            copies_per_token([1, 1], top_k, has_dedup=True)
    with pytest.raises(ConfigError, match="allowed are rows"):
        Combine("sums")  # type: ignore[arg-type]
    for wrong in (torch.tensor([[2]]), torch.tensor([[-1]]), torch.tensor([0]), torch.tensor([[0.0]])):
        with pytest.raises(ShapeError, match="expert_indices"):
            routed_bytes(wrong, placement, 0, 4, "int8", Combine())


def test_a_copy_at_home_costs_nothing_and_uniform_routing_visits_primary_copies() -> None:
    topology = logical_devices(2, 10**9)
    problem = PlacementProblem(1, 4, 1, 0, topology)
    names = [device.name for device in topology.devices]
    single = Placement.for_problem(problem, names, [[0, 1, 1, 0]])
    replicated = Placement.for_problem(problem, names, [[[0, 1], [1, 0], 1, [0]]])
    routing = torch.tensor([[0, 1], [1, 2], [3, 0]])
    for combine in (Combine("rows"), Combine()):
        row, answer = row_bytes(8, "int8"), row_bytes(8, "float32")
        counted = routed_bytes(routing, replicated, 0, 8, "int8", combine)
        assert (counted.dispatch_payload_bytes, counted.combine_payload_bytes) == (
            row,
            answer,
        )  # expert 2 alone is away
        assert routed_bytes(routing, single, 0, 8, "int8", combine).dispatch_payload_bytes == 2 * row
        expected = [expected_bytes_per_token(each, 2, 8, "int8", combine) for each in (replicated, single)]
        assert expected[0] == expected[1]
