import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.link import Link
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.solver import solve_placement
from cluster.placement.traced_solver import layer_problem, layer_rooms, link_costs
from cluster.placement.traffic import measure_placement
from cluster.routing.synthetic import clustered_trace, zipf_trace
from cluster.routing.trace import RoutingTrace
from cluster.topology import Device, Topology, logical_devices
from moe_bitnet.errors import ConfigError, PlacementError


@st.composite
def cases(draw: st.DrawFn) -> tuple[PlacementProblem, RoutingTrace, int]:
    """Unequal devices, at least one of which is needed, and a trace."""
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    sizes = draw(st.lists(st.integers(5, 60), min_size=1, max_size=5))
    topology = Topology(tuple(Device(f"d{i}", 7 * size) for i, size in enumerate(sizes)))
    problem = PlacementProblem(num_layers, num_experts, 7, draw(st.integers(0, 20)), topology)
    top_k = draw(st.integers(1, min(4, num_experts)))
    seed = draw(st.integers(0, 99))
    trace = clustered_trace(draw(st.integers(1, 60)), num_layers, num_experts, top_k, num_topics=1 + seed % num_experts)
    return problem, trace, draw(st.integers(1, len(sizes)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(), st.booleans())
def test_every_expert_is_placed_within_memory_and_a_seed_repeats(
    case: tuple[PlacementProblem, RoutingTrace, int], with_replicas: bool
) -> None:
    problem, trace, num_devices = case
    try:
        plain = solve_placement(problem, num_devices=num_devices)
    except PlacementError:
        with pytest.raises(PlacementError):
            solve_placement(problem, num_devices=num_devices, trace=trace)
        return
    placement = solve_placement(problem, num_devices=num_devices, trace=trace, with_replicas=with_replicas)
    placement.check(problem)
    assert placement.device_names == plain.device_names
    assert with_replicas or not placement.has_replicas
    again = solve_placement(problem, num_devices=num_devices, trace=trace, with_replicas=with_replicas)
    assert again == placement


@pytest.mark.parametrize("num_experts", [17, 33])
def test_layers_with_more_experts_are_placed_as_well(num_experts: int) -> None:
    topology = Topology((Device("a", 90), Device("b", 60), Device("c", 150), Device("d", 30)))
    problem = PlacementProblem(1, num_experts, 7, 10, topology)
    trace = clustered_trace(50, 1, num_experts, 3)
    placement = solve_placement(problem, num_devices=4, trace=trace, seed=5)
    placement.check(problem)
    assert solve_placement(problem, num_devices=4, trace=trace, seed=5) == placement


def test_a_trace_changes_what_is_where_and_not_how_many_devices() -> None:
    problem = PlacementProblem(2, 20, 10, 15, logical_devices(6, 120))
    trace = clustered_trace(1000, 2, 20, 4, num_topics=4)
    plain, traced = solve_placement(problem), solve_placement(problem, trace=trace)
    assert traced.num_devices == plain.num_devices == traced.lower_bound
    for before, after in zip(measure_placement(plain, trace), measure_placement(traced, trace), strict=True):
        assert after.visits_per_token < before.visits_per_token


def test_what_was_learned_on_one_half_serves_the_other() -> None:
    problem = PlacementProblem(1, 64, 1, 0, logical_devices(4, 20))
    learned, tested = clustered_trace(8000, 1, 64, 4, num_topics=8).split_half()
    plain = solve_placement(problem, num_devices=4)
    traced = solve_placement(problem, num_devices=4, trace=learned, max_imbalance=1.1)
    before, after = measure_placement(plain, tested)[0], measure_placement(traced, tested)[0]
    assert after.visits_per_token < 0.7 * before.visits_per_token
    assert after.imbalance < 1.15


def test_replicas_bring_a_hot_layer_under_the_cap() -> None:
    problem = PlacementProblem(1, 32, 1, 0, logical_devices(8, 6))
    trace = zipf_trace(4000, 1, 32, 2, exponent=1.0)
    alone = solve_placement(problem, num_devices=8, trace=trace)
    copied = solve_placement(problem, num_devices=8, trace=trace, with_replicas=True)
    (before,), (after,) = measure_placement(alone, trace), measure_placement(copied, trace)
    assert before.imbalance >= before.hottest_expert > 1.3  # out of reach without replicas, and no error
    assert after.imbalance < 1.2
    assert after.visits_per_token <= before.visits_per_token


@pytest.mark.parametrize("slow", ["device-1", "device-2"])
def test_slow_links_are_visited_less(slow: str) -> None:
    devices = logical_devices(3, 100).devices
    links = tuple(Link("device-0", name, 1e7 if name == slow else 1e9) for name in ("device-1", "device-2"))
    trace = clustered_trace(2000, 1, 12, 2, num_topics=3)
    problem = PlacementProblem(1, 12, 1, 0, Topology(devices, links))
    placement = solve_placement(problem, num_devices=3, trace=trace, max_imbalance=1.4)
    visits = {
        name: int(np.isin(trace.layer(0), placement.expert_ids_on(device, 0)).any(axis=1).sum())
        for device, name in enumerate(placement.device_names)
        if device > 0
    }
    assert min(visits, key=visits.__getitem__) == slow


def test_links_weigh_visits_where_all_are_known() -> None:
    devices = logical_devices(3, 100).devices
    names = [device.name for device in devices]
    there, back = Link("device-0", "device-1", 4e6), Link("device-1", "device-0", 4e6 / 3)
    slow, free = Link("device-0", "device-2", 1e6), Link("device-0", "device-2", float("inf"))

    def costs(*links: Link) -> list[float]:
        return link_costs(PlacementProblem(1, 1, 1, 0, Topology(devices, links)), names).tolist()

    assert costs() == costs(there, back) == [0, 1, 1]
    assert costs(there, back, slow) == [0, 0.5, 1]
    assert costs(there, back, free) == [0, 1, 0.01]


@pytest.mark.parametrize(
    ("slots", "num_layers", "num_experts"), [((7, 9), 2, 8), ((40, 3, 0), 3, 7), ((1, 1, 1), 1, 2)]
)
def test_rooms_share_out_all_memory(slots: tuple[int, ...], num_layers: int, num_experts: int) -> None:
    rooms = layer_rooms(slots, num_layers, num_experts)
    assert rooms.shape == (num_layers, len(slots))
    assert (rooms.sum(axis=0) <= slots).all()
    assert (rooms.sum(axis=1) >= num_experts).all()
    assert (rooms <= num_experts).all()


def test_loads_come_from_all_tokens_and_visits_from_a_sample() -> None:
    trace = zipf_trace(20_000, 1, 8, 2)
    problem = layer_problem(trace, 0, np.array([8, 8]), np.array([0.0, 1.0]), 1.2)
    assert len(problem.expert_indices) == 8192
    scale = 8192 / 20_000
    assert problem.expert_loads == pytest.approx(trace.tokens_per_expert(0) * scale)
    assert problem.load_cap == pytest.approx(1.2 * 2 * 8192 / 2)


def test_progress_counts_the_layers() -> None:
    seen: list[tuple[int, int]] = []
    problem = PlacementProblem(3, 4, 1, 0, logical_devices(2, 100))
    trace = clustered_trace(10, 3, 4, 2, num_topics=2)
    solve_placement(problem, num_devices=2, trace=trace, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_impossible_wishes_are_refused() -> None:
    problem = PlacementProblem(1, 4, 1, 0, logical_devices(2, 100))
    trace = clustered_trace(10, 1, 4, 2, num_topics=2)
    for value in (0.99, True, float("inf"), float("nan"), "1.2"):
        with pytest.raises(ConfigError, match="at least 1"):
            solve_placement(problem, trace=trace, max_imbalance=value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="without a trace"):
        solve_placement(problem, with_replicas=True)
    with pytest.raises(PlacementError, match="1 layers of 4 experts, the model 2 of 4"):
        solve_placement(PlacementProblem(2, 4, 1, 0, logical_devices(2, 100)), trace=trace)


def test_one_device_holds_all() -> None:
    placement = solve_placement(
        PlacementProblem(1, 4, 1, 0, logical_devices(3, 4)), trace=clustered_trace(10, 1, 4, 2, num_topics=2)
    )
    assert isinstance(placement, Placement)
    assert placement.devices_of_expert == (((0,),) * 4,)
