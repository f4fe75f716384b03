import json
from pathlib import Path

import pytest

from cluster.link import SAME_NODE, Link, LinkSpeed
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
    topology = Topology(
        (Device("big", 80 * 10**9, 5 * 10**9, "cuda", "n1", 3), Device("µ small", 33), Device("c", 1)),
        [Link("big", "c", 1.5e9, 2e-5), Link("n1", "µ small", 7)],
        LinkSpeed(1e9, 1e-4),
    )
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
        {"devices": [{"name": "a", "memory_bytes": 1}], "hosts": []},
        {"devices": [{"name": "a", "memory_bytes": 1}], "links": {}},
        {"devices": [{"name": "a", "memory_bytes": 1}], "default_link": 5},
        {"devices": [{"name": "a", "memory_bytes": 1}], "default_link": {"bandwidth_bytes_per_s": True}},
        {"devices": [{"name": "a", "memory_bytes": 1, "kind": "tpu"}]},
        {"devices": [{"name": "a", "memory_bytes": 1, "index": -1}]},
        {"devices": [{"name": "a", "memory_bytes": 1, "node_id": ""}]},
        {"devices": [{"name": "a", "memory_bytes": 1, "node_id": 3}]},
    ],
)
def test_another_form_is_refused_with_the_file_named(values: object, tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError):
        Topology.from_json(path)


FAST, SLOW, DEFAULT = LinkSpeed(2e9, 1e-5), LinkSpeed(1e8, 1e-3), LinkSpeed(1e9)


def test_a_link_is_found_by_devices_then_nodes_then_the_way_back_then_the_default() -> None:
    devices = [
        Device("a0", 1, node_id="a"),
        Device("a1", 1, node_id="a", index=1),
        Device("b0", 1, node_id="b"),
        Device("x", 1),
        Device("y", 1),
    ]
    topology = Topology(devices, [Link("a0", "b0", 2e9, 1e-5), Link("b", "a", 1e8, 1e-3)], DEFAULT)
    assert topology.link("a0", "b0") == FAST
    assert topology.link("b0", "a0") == SLOW
    assert topology.link("a1", "b0") == SLOW  # listed the other way round
    assert topology.link("x", "y") == topology.link("x", "a0") == DEFAULT
    assert topology.link("a0", "a1") == topology.link("x", "x") == SAME_NODE
    assert Topology(devices).link("a0", "b0") is None
    with pytest.raises(ConfigError, match="'z' is not in the topology, which has a0, a1, b0, x, y"):
        topology.link("a0", "z")


def test_a_link_takes_its_latency_and_its_bandwidth_into_account() -> None:
    assert LinkSpeed(1000, 0.5).seconds(250) == 0.75
    assert SAME_NODE.seconds(10**12) == 0


@pytest.mark.parametrize(("bandwidth", "latency"), [(0, 0), (-1, 0), (float("nan"), 0), ("1", 0), (1, -1), (1, None)])
def test_an_impossible_speed_is_refused(bandwidth: object, latency: object) -> None:
    with pytest.raises(ConfigError, match="link: "):
        LinkSpeed(bandwidth, latency)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([("a", "z")], "names 'z'.*devices a, b, and nodes n"),
        ([("a", "a")], "both 'a'"),
        ([("a", "")], "destination is ''"),
        ([("a", "b"), ("a", "b")], "links given twice: a → b"),
    ],
)
def test_a_link_between_what_is_not_there_is_refused_with_the_file_named(
    ends: list[tuple[str, str]], message: str, tmp_path: Path
) -> None:
    devices = [{"name": "a", "memory_bytes": 1}, {"name": "b", "memory_bytes": 1, "node_id": "n"}]
    links = [{"source": source, "destination": end, "bandwidth_bytes_per_s": 1} for source, end in ends]
    path = tmp_path / "topology.json"
    path.write_text(json.dumps({"devices": devices, "links": links}))
    with pytest.raises(ConfigError, match=f"topology.json.*{message}"):
        Topology.from_json(path)


def test_a_gpu_is_listed_once() -> None:
    with pytest.raises(ConfigError, match="cuda:1 on node n"):
        Topology((Device("a", 1, 0, "cuda", "n", 1), Device("b", 1, 0, "cuda", "n", 1)))
    Topology((Device("a", 1, 0, "cuda", "n", 1), Device("b", 1, 0, "cuda", "m", 1)))
    Topology((Device("a", 1, 0, "cpu", "n", 1), Device("b", 1, 0, "cpu", "n", 1)))  # shares of one memory


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("devices: a")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for name in ("text.json", "bytes.json", "deep.json", "absent.json"):
        with pytest.raises(ConfigError, match=name):
            Topology.from_json(tmp_path / name)
