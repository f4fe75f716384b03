import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement.bound import device_lower_bound
from cluster.placement.problem import PlacementProblem
from cluster.placement.solver import solve_placement
from cluster.topology import Device, Topology, logical_devices
from moe_bitnet.errors import PlacementError

# layers, experts, hidden, intermediate; devices of 24 GB cards (20 usable) and 80 GB cards (75 usable) at
# 16, 2 and 1.6 bits a weight. Expert weights only; DeepSeek-V3 has 58 MoE layers of its 61.
MODELS = {
    "Mixtral-8x7B": (32, 8, 4096, 14336, 90.2, (5, 1, 1), (2, 1, 1)),
    "Qwen3-30B-A3B": (48, 128, 2048, 768, 58.0, (3, 1, 1), (1, 1, 1)),
    "OLMoE-1B-7B": (16, 64, 2048, 1024, 12.9, (1, 1, 1), (1, 1, 1)),
    "DeepSeek-V3": (58, 256, 7168, 2048, 1307.8, (66, 9, 7), (18, 3, 2)),
}


def fewest_by_brute_force(problem: PlacementProblem) -> int | None:
    """Try every home and every number of experts on each device."""
    devices = problem.topology.devices
    best = None
    for counts in itertools.product(range(problem.total_experts + 1), repeat=len(devices)):
        if sum(counts) != problem.total_experts:
            continue
        for home in range(len(devices)):
            used = [c * problem.expert_bytes + problem.home_bytes * (i == home) for i, c in enumerate(counts)]
            if all(size <= device.usable_bytes for size, device in zip(used, devices, strict=True)):
                num_used = sum(c > 0 or i == home for i, c in enumerate(counts))
                best = num_used if best is None else min(best, num_used)
    return best


@st.composite
def problems(draw: st.DrawFn) -> PlacementProblem:
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    return PlacementProblem(
        num_layers=draw(st.integers(1, 2)),
        num_experts=draw(st.integers(1, 3)),
        expert_bytes=draw(st.integers(1, 9)),
        home_bytes=draw(st.integers(0, 20)),
        topology=Topology(tuple(Device(f"d{i}", size) for i, size in enumerate(sizes))),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems())
def test_the_number_of_devices_is_minimal(problem: PlacementProblem) -> None:
    fewest = fewest_by_brute_force(problem)
    if fewest is None:
        with pytest.raises(PlacementError):
            solve_placement(problem)
        return
    placement = solve_placement(problem)
    assert placement.num_devices == fewest
    assert placement.lower_bound <= fewest
    placement.check(problem)
    assert solve_placement(problem) == placement


def test_the_home_is_chosen_for_its_rounding() -> None:
    # 3 bytes at home cost the device of 20 two experts of two bytes, and the device of 19 only one
    problem = PlacementProblem(1, 18, 2, 3, Topology((Device("even", 20), Device("odd", 19))))
    placement = solve_placement(problem)
    assert placement.device_names == ("odd", "even")
    assert placement.bytes_per_device == (19, 20)


def test_a_home_that_fills_its_device_holds_no_expert() -> None:
    problem = PlacementProblem(1, 2, 10, 25, Topology((Device("small", 20), Device("large", 25))))
    placement = solve_placement(problem)
    assert placement.device_names == ("large", "small")
    assert placement.devices_of_expert == (((1,), (1,)),)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 4))
def test_spread_uses_exactly_the_devices_asked_for(problem: PlacementProblem, num_devices: int) -> None:
    fewest = fewest_by_brute_force(problem)
    if fewest is None or not fewest <= num_devices <= problem.topology.num_devices:
        with pytest.raises(PlacementError):
            solve_placement(problem, num_devices=num_devices)
        return
    placement = solve_placement(problem, num_devices=num_devices)
    assert placement.num_devices == num_devices
    placement.check(problem)


@pytest.mark.parametrize(("num_layers", "num_experts", "num_devices"), [(1, 1, 1), (3, 7, 2), (7, 33, 4), (2, 3, 5)])
def test_equal_devices_share_each_layer_to_within_one(num_layers: int, num_experts: int, num_devices: int) -> None:
    problem = PlacementProblem(num_layers, num_experts, 10, 5, logical_devices(num_devices, 10_000))
    placement = solve_placement(problem, num_devices=num_devices)
    totals = [0] * num_devices
    for layer_index in range(num_layers):
        counts = placement.num_experts_per_device(layer_index)
        assert max(counts) - min(counts) <= 1
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
    assert max(totals) - min(totals) <= 1


def test_expert_ids_are_contiguous_in_each_layer() -> None:
    placement = solve_placement(PlacementProblem(3, 7, 10, 5, logical_devices(3, 1000)), num_devices=3)
    for layer_index in range(3):
        ids = [placement.expert_ids_on(device_index, layer_index) for device_index in range(3)]
        assert [expert_id for device_ids in ids for expert_id in device_ids] == list(range(7))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("usable_gb", [20, 75])
def test_published_models_need_the_device_counts_of_the_design_table(model: str, usable_gb: int) -> None:
    num_layers, num_experts, hidden_size, intermediate_size, fp16_gb, on_24_gb, on_80_gb = MODELS[model]
    weights = 3 * hidden_size * intermediate_size
    assert num_layers * num_experts * weights * 2 / 1e9 == pytest.approx(fp16_gb, abs=0.05)
    topology = logical_devices(70, usable_gb * 10**9)
    device_counts = []
    for expert_bytes in (2 * weights, weights // 4, -(-weights // 5)):
        problem = PlacementProblem(num_layers, num_experts, expert_bytes, 0, topology)
        placement = solve_placement(problem)
        device_counts.append(placement.num_devices)
        assert placement.lower_bound == math.ceil(problem.total_bytes / (usable_gb * 10**9))
        assert placement.num_devices == placement.lower_bound
    assert tuple(device_counts) == (on_24_gb if usable_gb == 20 else on_80_gb)


def test_the_bound_counts_home_bytes_and_unequal_devices() -> None:
    unequal = Topology((Device("a", 10), Device("b", 50), Device("c", 30)))
    assert device_lower_bound(PlacementProblem(1, 5, 10, 0, unequal)) == 1
    assert device_lower_bound(PlacementProblem(1, 5, 10, 1, unequal)) == 2
    assert device_lower_bound(PlacementProblem(1, 9, 10, 0, unequal)) == 3
    assert device_lower_bound(PlacementProblem(1, 9, 10, 1, unequal)) == 4
    assert device_lower_bound(PlacementProblem(1, 19, 10, 1, unequal)) == 6


def test_an_expert_larger_than_every_device_is_named_with_both_sizes() -> None:
    problem = PlacementProblem(1, 1, 1_200_000, 0, Topology((Device("cpu", 10), Device("gpu", 1_000_000))))
    with pytest.raises(PlacementError, match=r"one expert needs 1\.2 MB, the largest device 'gpu' offers 1 MB.*200 kB"):
        solve_placement(problem)


def test_a_home_part_larger_than_every_device_is_named() -> None:
    problem = PlacementProblem(1, 1, 10, 130, logical_devices(2, 100))
    with pytest.raises(PlacementError, match=r"not routed experts needs 130 B.*'device-0' offers 100 B.*30 B"):
        solve_placement(problem)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(0, 90), st.integers(1, 3))
def test_adding_the_devices_that_the_error_asks_for_helps_and_one_fewer_does_not(
    num_experts: int, home_bytes: int, num_devices: int
) -> None:
    def problem(count: int) -> PlacementProblem:
        return PlacementProblem(1, num_experts, 9, home_bytes, logical_devices(count, 100))

    try:
        solve_placement(problem(num_devices))
    except PlacementError as error:
        more = int(str(error).split("needs ")[1].split(" more devices")[0])
        solve_placement(problem(num_devices + more))
        if more > 1:
            with pytest.raises(PlacementError, match="needs 1 more devices"):
                solve_placement(problem(num_devices + more - 1))


def test_spreading_over_impossible_numbers_is_refused() -> None:
    problem = PlacementProblem(2, 4, 10, 5, logical_devices(3, 45))
    for num_devices in (0, -1, 4, True, 2.0):
        with pytest.raises(PlacementError, match="1 to 3"):
            solve_placement(problem, num_devices=num_devices)  # type: ignore[arg-type]
    with pytest.raises(PlacementError, match="at least 2"):
        solve_placement(problem, num_devices=1)
