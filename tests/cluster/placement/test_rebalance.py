import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.rebalance import Rebalance, rebalance_placement
from cluster.placement.solver import solve_placement
from cluster.placement.traffic import measure_placement
from cluster.routing.synthetic import clustered_trace
from cluster.topology import Device, Topology, logical_devices
from moe_bitnet.errors import ConfigError, PlacementError


def devices(**sizes: int) -> Topology:
    return Topology(tuple(Device(name, size) for name, size in sizes.items()))


def problem_on(topology: Topology, num_layers: int = 2, num_experts: int = 6) -> PlacementProblem:
    return PlacementProblem(num_layers, num_experts, 10, 5, topology)


def names_of_copies(placement: Placement) -> list[list[set[str]]]:
    return [[{placement.device_names[d] for d in copies} for copies in layer] for layer in placement.devices_of_expert]


def check_moves(result: Rebalance, old: Placement, problem: PlacementProblem) -> None:
    """The moves are exactly what is new, and come from where it was."""
    present = {device.name for device in problem.topology.devices}
    expected = set()
    for layer_index, (before, after) in enumerate(
        zip(names_of_copies(old), names_of_copies(result.placement), strict=True)
    ):
        for expert_id in range(problem.num_experts):
            expected |= {(layer_index, expert_id, name) for name in after[expert_id] - before[expert_id]}
    assert {(move.layer_index, move.expert_id, move.target) for move in result.moves} == expected
    assert len(result.moves) == len(expected)
    for move in result.moves:
        held = names_of_copies(old)[move.layer_index][move.expert_id]
        assert (move.source in held & present) if held & present else move.source is None
        assert move.num_bytes == problem.expert_bytes


def test_nothing_moves_where_nothing_changed() -> None:
    problem = problem_on(devices(a=60, b=60, c=60))
    old = solve_placement(problem)
    result = rebalance_placement(problem, old)
    assert result.placement == old
    assert (result.moves, result.moved_bytes) == ((), 0)
    trace = clustered_trace(500, 2, 6, 2, num_topics=2)
    solved = solve_placement(problem, trace=trace)
    assert rebalance_placement(problem, solved, trace=trace).placement == solved


def test_only_experts_of_a_lost_device_move() -> None:
    old = solve_placement(problem_on(devices(a=60, b=60, c=60, d=60)), num_devices=3)
    problem = problem_on(devices(a=60, c=60, d=60))
    result = rebalance_placement(problem, old)
    result.placement.check(problem)
    check_moves(result, old, problem)
    assert set(result.placement.device_names) == {"a", "c", "d"}
    lost = sum(names == {"b"} for layer in names_of_copies(old) for names in layer)
    assert len(result.moves) == lost > 0
    assert all(move.source is None for move in result.moves)
    assert result.moved_bytes == lost * 10


def test_a_replica_of_a_lost_expert_takes_over_at_no_cost() -> None:
    before = problem_on(devices(a=200, b=200, c=200), num_layers=1, num_experts=3)
    old = Placement.for_problem(before, ["a", "b", "c"], [[[1, 2], [0], [2]]])
    result = rebalance_placement(problem_on(devices(a=200, c=200), 1, 3), old)
    assert result.moves == ()
    assert names_of_copies(result.placement) == [[{"c"}, {"a"}, {"c"}]]


def test_a_new_device_takes_its_share_and_no_more() -> None:
    old = solve_placement(problem_on(devices(a=200, b=200), num_layers=3, num_experts=12), num_devices=2)
    problem = problem_on(devices(a=200, b=200, c=200), num_layers=3, num_experts=12)
    assert rebalance_placement(problem, old).moves == ()  # two devices suffice
    result = rebalance_placement(problem, old, num_devices=3)
    check_moves(result, old, problem)
    assert all(move.target == "c" for move in result.moves)
    for layer in range(3):
        assert result.placement.num_experts_per_device(layer) == [4, 4, 4]


def test_fewer_devices_are_left_by_the_one_that_holds_least() -> None:
    before = problem_on(devices(a=200, b=200, c=200), num_layers=1)
    old = Placement.for_problem(before, ["a", "b", "c"], [[0, 0, 1, 2, 2, 2]])
    result = rebalance_placement(before, old, num_devices=2)
    assert result.placement.device_names == ("a", "c")
    assert [(move.expert_id, move.source) for move in result.moves if move.expert_id == 2] == [(2, "b")]


def test_a_device_that_shrank_gives_up_replicas_first() -> None:
    before = problem_on(devices(a=65, b=60), num_layers=1)
    old = Placement.for_problem(before, ["a", "b"], [[0, [0, 1], 0, 1, 1, 1]])
    result = rebalance_placement(problem_on(devices(a=25, b=60), num_layers=1), old)
    assert result.placement.bytes_per_device == (25, 40)
    assert {move.expert_id for move in result.moves} <= {0, 2}
    assert len(result.moves) == 0 or result.moves[0].target == "b"
    smaller = rebalance_placement(problem_on(devices(a=65, b=30), num_layers=1), old)
    assert smaller.moves == ()
    assert smaller.placement.num_replicas == 0


def test_the_home_stays_and_moves_only_if_it_must() -> None:
    old = solve_placement(problem_on(devices(a=70, b=70), num_layers=1), num_devices=2)
    assert old.device_names[0] == "a"
    stays = rebalance_placement(problem_on(devices(b=900, a=70), num_layers=1), old)
    assert (stays.placement.device_names[0], stays.moved_home_bytes) == ("a", 0)
    moves = rebalance_placement(problem_on(devices(b=70, c=900), num_layers=1), old)
    assert (moves.placement.device_names[0], moves.moved_home_bytes) == ("b", 5)
    assert moves.moved_bytes == 5 + 10 * len(moves.moves)


def test_moved_bytes_are_weighed_against_traffic() -> None:
    problem = PlacementProblem(1, 32, 1_000_000, 0, logical_devices(4, 12_000_000))
    trace = clustered_trace(3000, 1, 32, 4, num_topics=4)
    old = solve_placement(problem, num_devices=4)
    results = [
        rebalance_placement(problem, old, trace=trace, horizon_tokens=horizon, max_imbalance=1.5)
        for horizon in (1, 10_000, 10_000_000)
    ]
    num_moves = [len(result.moves) for result in results]
    visits = [measure_placement(result.placement, trace)[0].visits_per_token for result in results]
    assert num_moves == sorted(num_moves)
    assert visits == sorted(visits, reverse=True)
    assert num_moves[0] < num_moves[2]
    assert visits[2] < 0.8 * visits[0]
    check_moves(results[2], old, problem)


def test_a_seed_repeats_and_the_answer_is_json() -> None:
    problem = problem_on(devices(a=60, b=60, c=60))
    trace = clustered_trace(300, 2, 6, 2, num_topics=2)
    old = solve_placement(problem)
    result = rebalance_placement(problem, old, trace=trace, seed=3)
    assert rebalance_placement(problem, old, trace=trace, seed=3) == result
    values = json.loads(json.dumps(result.to_dict()))
    assert Placement.from_dict(values["placement"], problem) == result.placement
    assert values["moved_bytes"] == 10 * len(values["moves"])


@st.composite
def changes(draw: st.DrawFn) -> tuple[PlacementProblem, Placement, PlacementProblem]:
    """A placement, perhaps with replicas, and devices of which some vanished, came or changed."""
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    sizes = st.integers(10, 150)
    before = {f"d{i}": draw(sizes) for i in range(draw(st.integers(1, 4)))}
    after = {name: draw(st.sampled_from([size, draw(sizes)])) for name, size in before.items() if draw(st.booleans())}
    after |= {f"n{i}": draw(sizes) for i in range(draw(st.integers(0, 2)))}
    roomy = problem_on(
        Topology(tuple(Device(name, size + 1000) for name, size in before.items())), num_layers, num_experts
    )
    copies = st.lists(st.integers(0, len(before) - 1), min_size=1, max_size=2, unique=True)
    layers = [[draw(copies) for _ in range(num_experts)] for _ in range(num_layers)]
    old = Placement.for_problem(roomy, list(before), layers)
    topology = Topology(tuple(Device(name, size) for name, size in (after or {"n0": draw(sizes)}).items()))
    return roomy, old, problem_on(topology, num_layers, num_experts)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(changes(), st.booleans())
def test_any_change_ends_in_a_placement_that_fits_or_says_why_not(
    change: tuple[PlacementProblem, Placement, PlacementProblem], has_trace: bool
) -> None:
    _, old, problem = change
    trace = clustered_trace(30, problem.num_layers, problem.num_experts, 1, num_topics=1) if has_trace else None
    rooms = [
        sum(problem.slots_on(device, is_home=device is home) for device in problem.topology.devices)
        for home in problem.topology.devices
        if home.usable_bytes >= problem.home_bytes
    ]
    if max(rooms, default=0) < problem.total_experts:
        with pytest.raises(PlacementError, match=r"missing|no device offers"):
            rebalance_placement(problem, old, trace=trace)
        return
    if min(rooms) < problem.total_experts:  # it depends on the home, and the old one is kept
        return
    result = rebalance_placement(problem, old, trace=trace)
    result.placement.check(problem)
    check_moves(result, old, problem)


def test_impossible_wishes_are_refused() -> None:
    problem = problem_on(devices(a=60, b=60, c=60))
    old = solve_placement(problem)
    for count in (0, 4, True):
        with pytest.raises(PlacementError, match="1 to 3"):
            rebalance_placement(problem, old, num_devices=count)
    with pytest.raises(PlacementError, match="missing"):
        rebalance_placement(problem, old, num_devices=1)
    with pytest.raises(PlacementError, match="Solve the placement anew"):
        rebalance_placement(problem_on(devices(a=600), num_layers=3), old)
    with pytest.raises(PlacementError, match="not routed experts needs 5 B"):
        rebalance_placement(problem_on(devices(a=4)), old)
    for values in ({"horizon_tokens": 0}, {"bytes_per_visit": float("nan")}):
        with pytest.raises(ConfigError, match="positive"):
            rebalance_placement(problem, old, **values)
    with pytest.raises(PlacementError, match="trace"):
        rebalance_placement(problem, old, trace=clustered_trace(3, 1, 6, 2, num_topics=2))


def test_uneven_numbers_are_evened_out_no_further_than_the_cap() -> None:
    problem = problem_on(devices(a=500, b=500), num_layers=1, num_experts=10)
    old = Placement.for_problem(problem, ["a", "b"], [[0] * 8 + [1] * 2])
    counts = rebalance_placement(problem, old).placement.num_experts_per_device(0)
    assert counts == [5, 5]
    loose = rebalance_placement(problem, old, max_imbalance=1.4)
    assert loose.placement.num_experts_per_device(0) == [7, 3]
    assert np.sum([move.num_bytes for move in loose.moves]) == 10
