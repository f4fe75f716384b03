import json
from pathlib import Path

import pytest

from cluster.topology import Device, Topology, logical_devices
from moe_bitnet.errors import ConfigError


def test_usable_bytes_are_what_is_not_reserved() -> None:
    assert Device("a", 24, reserved_bytes=4).usable_bytes == 20


@pytest.mark.parametrize(
    "fields",
    [("", 1, 0), (3, 1, 0), ("a", 0, 0), ("a", -5, 0), ("a", 1.5, 0), ("a", True, 0), ("a", 5, -1), ("a", 5, 5)],
)
def test_an_impossible_device_is_refused(fields: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError, match="Device"):
        Device(*fields)  # type: ignore[arg-type]


def test_a_topology_needs_devices_with_distinct_names() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        Topology(())
    with pytest.raises(ConfigError, match="twice: a"):
        Topology((Device("a", 1), Device("b", 1), Device("a", 2)))


def test_logical_devices_are_equal_and_named_apart() -> None:
    topology = logical_devices(3, 7)
    assert [device.name for device in topology.devices] == ["device-0", "device-1", "device-2"]
    assert {device.usable_bytes for device in topology.devices} == {7}
    for count in (0, -1, True, 2.0):
        with pytest.raises(ConfigError, match="number of devices"):
            logical_devices(count, 7)  # type: ignore[arg-type]


def test_a_topology_survives_its_file(tmp_path: Path) -> None:
    topology = Topology((Device("big", 80 * 10**9, 5 * 10**9), Device("µ small", 33)))
    path = tmp_path / "topology.json"
    topology.to_json(path)
    assert Topology.from_json(path) == topology


def test_a_hand_written_file_may_use_units(tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    path.write_text('{"devices": [{"name": "a", "memory_bytes": "24GB", "reserved_bytes": "4 GiB"}]}')
    assert Topology.from_json(path).devices == (Device("a", 24 * 10**9, 4 * 2**30),)


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {"devices": {}},
        {"devices": []},
        {"devices": ["a"]},
        {"devices": [{"name": "a"}]},
        {"devices": [{"name": "a", "memory_bytes": 1, "speed": 2}]},
        {"devices": [{"name": "a", "memory_bytes": "many"}]},
        {"devices": [{"name": ["a"], "memory_bytes": 1}]},
        {"devices": [{"name": "a", "memory_bytes": 1, "reserved_bytes": None}]},
        {"devices": [{"name": "a", "memory_bytes": 1}], "links": []},
    ],
)
def test_another_form_is_refused_with_the_file_named(values: object, tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError):
        Topology.from_json(path)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("devices: a")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for name in ("text.json", "bytes.json", "deep.json", "absent.json"):
        with pytest.raises(ConfigError, match=name):
            Topology.from_json(tmp_path / name)
