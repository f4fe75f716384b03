import dataclasses
from pathlib import Path

import pytest

from cluster.placement.problem import PlacementProblem
from cluster.topology import Device, Topology, logical_devices
from moe_bitnet.errors import ConfigError

PROBLEM = PlacementProblem(
    num_layers=3,
    num_experts=7,
    expert_bytes=10,
    home_bytes=33,
    topology=Topology((Device("a", 100, 4), Device("b", 9))),
)


def test_totals_count_every_expert_and_the_home_part() -> None:
    assert PROBLEM.total_experts == 21
    assert PROBLEM.total_bytes == 243


def test_slots_are_whole_experts_beside_the_home_part() -> None:
    large, small = PROBLEM.topology.devices
    assert PROBLEM.slots_on(large) == 9
    assert PROBLEM.slots_on(large, is_home=True) == 6
    assert PROBLEM.slots_on(small) == 0
    assert PROBLEM.slots_on(small, is_home=True) == 0


def test_a_problem_survives_its_file(tmp_path: Path) -> None:
    PROBLEM.to_json(tmp_path / "problem.json")
    assert PlacementProblem.from_json(tmp_path / "problem.json") == PROBLEM


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"num_experts": -1},
        {"expert_bytes": 0},
        {"expert_bytes": 1.5},
        {"home_bytes": -1},
        {"num_layers": True},
        {"topology": None},
    ],
)
def test_an_impossible_size_is_named(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(PROBLEM, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"home_bytes": None}, {"num_layers": "3"}, {"topology": {}}, {"extra": 1}])
def test_another_form_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        PlacementProblem.from_dict({**PROBLEM.to_dict(), **change})
    with pytest.raises(ConfigError, match="fields"):
        PlacementProblem.from_dict([PROBLEM.to_dict()])


def test_zero_home_bytes_are_allowed() -> None:
    assert PlacementProblem(1, 1, 1, 0, logical_devices(1, 1)).total_bytes == 1
