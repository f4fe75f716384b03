import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.solver import solve_placement
from cluster.topology import Device, Topology
from moe_bitnet.errors import ConfigError, PlacementError

PROBLEM = PlacementProblem(
    num_layers=2,
    num_experts=4,
    expert_bytes=10,
    home_bytes=5,
    topology=Topology((Device("a", 45), Device("b", 60), Device("c", 20))),
)
OWN: dict[str, Any] = {"device_names": ["a", "b"], "devices_of_expert": [[0, 1, 0, 1], [1, 1, 0, 0]]}


def test_a_hand_written_placement_is_usable() -> None:
    placement = Placement.from_dict(OWN, PROBLEM)
    assert (placement.num_devices, placement.num_layers, placement.num_experts) == (2, 2, 4)
    assert placement.bytes_per_device == (45, 40)
    assert placement.lower_bound == 2
    assert placement.expert_ids_on(0, 0) == [0, 2]
    assert placement.expert_ids_on(1, 1) == [0, 1]
    assert placement.num_experts_per_device(0) == [2, 2]


def test_replicas_count_as_copies_and_the_first_is_the_primary() -> None:
    placement = Placement.from_dict({**OWN, "devices_of_expert": [[0, [1, 0], 1, 1], [1, 1, [0], [1]]]}, PROBLEM)
    assert placement.devices_of_expert == (((0,), (1, 0), (1,), (1,)), ((1,), (1,), (0,), (1,)))
    assert placement.has_replicas
    assert placement.num_replicas == 1
    assert placement.bytes_per_device == (35, 60)
    assert placement.primary_devices(0) == [0, 1, 1, 1]
    assert placement.expert_ids_on(0, 0) == [0, 1]
    assert placement.expert_ids_on(1, 0) == [1, 2, 3]
    assert placement.num_experts_per_device(0) == [2, 3]
    assert not Placement.from_dict(OWN, PROBLEM).has_replicas


def test_a_written_placement_has_a_list_of_devices_for_every_expert() -> None:
    written = Placement.from_dict(OWN, PROBLEM).to_dict()
    assert written["devices_of_expert"] == [[[0], [1], [0], [1]], [[1], [1], [0], [0]]]
    assert Placement.from_dict(written, PROBLEM) == Placement.from_dict(OWN, PROBLEM)


def test_a_solved_placement_survives_its_file_and_pickling(tmp_path: Path) -> None:
    placement = solve_placement(PROBLEM)
    placement.to_json(tmp_path / "placement.json")
    assert Placement.from_json(tmp_path / "placement.json", PROBLEM) == placement
    assert pickle.loads(pickle.dumps(placement)) == placement


def test_sizes_come_from_the_problem_and_not_from_the_file() -> None:
    stale = {**OWN, "bytes_per_device": [1, 1], "lower_bound": 99}
    assert Placement.from_dict(stale, PROBLEM) == Placement.from_dict(OWN, PROBLEM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device_names": ["a", "nowhere"]}, "'nowhere' is not in the topology"),
        ({"device_names": ["a", ["b"]]}, "not in the topology"),
        ({"device_names": ["a", "a"]}, "named twice"),
        ({"device_names": []}, "names no device"),
        ({"device_names": "ab"}, "list of names"),
        ({"devices_of_expert": [[0, 1, 0, 1]]}, "1 layers, the model has 2"),
        ({"devices_of_expert": [[0, 1, 0, 1], [0, 1, 0]]}, "layer 1 places 3 experts, the model has 4"),
        ({"devices_of_expert": [[0, 1, 0, 2], [0, 0, 1, 1]]}, "layer 0 puts expert 3 on device 2"),
        ({"devices_of_expert": [[0, 1, 0, -1], [0, 0, 1, 1]]}, "device -1"),
        ({"devices_of_expert": [[0, 1, 0, True], [0, 0, 1, 1]]}, "device True"),
        ({"devices_of_expert": [[0, 1, 0, 1.0], [0, 0, 1, 1]]}, r"device 1\.0"),
        ({"devices_of_expert": [[0, 1, 0, "b"], [0, 0, 1, 1]]}, "device 'b'"),
        ({"devices_of_expert": [[0, 1, [0, 2], 1], [0, 0, 1, 1]]}, "layer 0 puts expert 2 on device 2"),
        ({"devices_of_expert": [[0, 1, [], 1], [0, 0, 1, 1]]}, "layer 0 puts expert 2 on no device"),
        ({"devices_of_expert": [[0, 1, [1, 0, 1], 1], [0, 0, 1, 1]]}, "layer 0 puts expert 2 twice on one device"),
        ({"devices_of_expert": [[0, 1, [[0]], 1], [0, 0, 1, 1]]}, r"device \[0\]"),
        ({"devices_of_expert": [0, 1]}, "list with one list"),
        ({"devices_of_expert": [[0, 0, 0, 1], [0, 0, 1, 1]]}, "'a' would hold 55 B and offers 45 B: 10 B are missing"),
        (
            {"devices_of_expert": [[0, [1, 0], 0, 1], [1, [1, 0], 0, 0]]},
            "'a' would hold 65 B and offers 45 B: 20 B are missing",
        ),
        ({"comment": "mine"}, "expected a JSON object"),
    ],
)
def test_a_wrong_placement_is_refused_with_its_fault(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement.from_dict({**OWN, **change}, PROBLEM)


@pytest.mark.parametrize("values", [None, [], {}, {"device_names": ["a"]}])
def test_another_form_is_refused(values: object) -> None:
    with pytest.raises(PlacementError, match="expected a JSON object"):
        Placement.from_dict(values, PROBLEM)


def test_a_file_fault_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**OWN, "device_names": ["a", "z"]}))
    with pytest.raises(PlacementError, match=r"mine\.json"):
        Placement.from_json(path, PROBLEM)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"mine\.json"):
        Placement.from_json(path, PROBLEM)


def test_check_refuses_another_problem() -> None:
    placement = Placement.from_dict(OWN, PROBLEM)
    placement.check(PROBLEM)
    with pytest.raises(PlacementError, match="hold"):
        placement.check(dataclasses.replace(PROBLEM, expert_bytes=11))
    with pytest.raises(PlacementError, match="hold"):
        placement.check(dataclasses.replace(PROBLEM, home_bytes=6))
    with pytest.raises(PlacementError, match="layers"):
        placement.check(dataclasses.replace(PROBLEM, num_layers=3))
