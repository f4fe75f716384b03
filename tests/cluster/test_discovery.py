import logging
import os
import signal
import socket
import time

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from cluster import discovery
from cluster.discovery import ClusterNode, alive_nodes, discover_topology, node_devices
from cluster.link import SAME_NODE
from cluster.machine import boot_id
from cluster.node_memory import NodeMemory, measure_memory
from cluster.reserve import reserve_bytes
from moe_bitnet.errors import ClusterError, ConfigError

GB = 10**9


def node(name, num_gpus=0, memory_bytes=0):
    return ClusterNode(f"id-{name}", name, "127.0.0.1", num_gpus, memory_bytes)


# --- From measured memory to devices, without Ray


def test_gpus_are_devices_of_their_own_and_hide_the_ram():
    nodes = [node("a", num_gpus=2), node("b", memory_bytes=5 * GB)]
    memory = {"id-a": NodeMemory("m1", 64 * GB, (20 * GB, 22 * GB)), "id-b": NodeMemory("m2", 8 * GB, ())}
    devices = node_devices(nodes, memory, reserved_bytes=GB)
    assert [(each.name, each.kind, each.node_id, each.index, each.memory_bytes) for each in devices] == [
        ("a-cuda-0", "cuda", "id-a", 0, 20 * GB),
        ("a-cuda-1", "cuda", "id-a", 1, 22 * GB),
        ("b-cpu", "cpu", "id-b", 0, 5 * GB),  # Ray's memory resource is the ceiling
    ]
    assert {each.reserved_bytes for each in devices} == {GB}


def test_nodes_on_one_machine_share_its_ram():
    nodes = [node("a"), node("b"), node("c")]
    memory = {
        "id-a": NodeMemory("m1", 9 * GB, ()),
        "id-b": NodeMemory("m1", 8 * GB, ()),
        "id-c": NodeMemory("m2", GB, ()),
    }
    assert [each.memory_bytes for each in node_devices(nodes, memory, 0)] == [9 * GB // 2, 4 * GB, GB]


def test_a_device_with_nothing_to_spare_is_left_out_by_name(caplog):
    memory = {"id-a": NodeMemory("m1", 64 * GB, (GB, 22 * GB))}
    devices = node_devices([node("a", num_gpus=2)], memory, reserved_bytes=GB)
    assert [(each.name, each.index) for each in devices] == [("a-cuda-1", 1)]
    assert "device a-cuda-0 is left out: 1 GB are free, 1 GB are reserved" in caplog.text


def test_a_gpu_that_torch_does_not_see_is_told(caplog):
    devices = node_devices([node("a", num_gpus=1)], {"id-a": NodeMemory("m1", 2 * GB, ())}, 0)
    assert [each.name for each in devices] == ["a-cpu"]
    assert "node a announces 1 GPUs, torch sees 0 there" in caplog.text


def test_free_memory_of_gpus_is_measured_one_by_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (100 + index, 500))
    assert measure_memory(max_gpus=8).gpu_bytes == (100, 101, 102)
    assert measure_memory(max_gpus=2).gpu_bytes == (100, 101)
    assert measure_memory().gpu_bytes == ()
    assert 0 < measure_memory().ram_bytes <= psutil.virtual_memory().total


def test_many_nodes_are_measured_from_the_home_alone(caplog):
    few, many = [node(f"n{i}") for i in range(8)], [node(f"n{i}") for i in range(9)]
    assert len(discovery._pairs(few)) == 8 * 7
    pairs = discovery._pairs(many)
    assert len(pairs) == 2 * 8
    assert all(many[0] in pair for pair in pairs)
    assert "9 nodes: links are measured from n0 to each other node and back" in caplog.text


def test_without_ray_it_says_so_and_starts_none():
    assert not ray.is_initialized()
    with pytest.raises(ClusterError, match="Ray is not connected"):
        discover_topology()
    assert not ray.is_initialized()


# --- A cluster of three raylets on this machine


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"node_name": "head", "memory": 4 * GB})
    cluster.workers = [
        cluster.add_node(node_name=name, memory=size, resources={"slot": 1}, labels={"role": "experts", "rack": name})
        for name, size in (("west", 2 * GB), ("east", GB))
    ]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.ray
def test_every_node_is_measured_and_every_link(cluster):
    start = time.monotonic()
    topology = discover_topology(reserved_bytes=123)
    assert time.monotonic() - start < 30
    assert [each.name for each in topology.devices] == ["head-cpu", "east-cpu", "west-cpu"]  # the home comes first
    assert [each.node_id for each in topology.devices] == [each.node_id for each in alive_nodes()]
    free = psutil.virtual_memory().total
    for device, ceiling in zip(topology.devices, (4 * GB, GB, 2 * GB), strict=True):
        assert device.kind == "cpu"
        assert device.reserved_bytes == 123
        assert 0 < device.memory_bytes <= min(ceiling, free // 3)
    assert len(topology.links) == 6
    for source in topology.devices:
        for destination in topology.devices:
            speed = topology.link(source.name, destination.name)
            if source == destination:
                assert speed == SAME_NODE
            else:
                assert 1e-6 < speed.latency_s < 0.1
                assert 1e6 < speed.bandwidth_bytes_per_s < 1e12


@pytest.mark.ray
def test_nodes_are_chosen_by_their_labels(cluster):
    topology = discover_topology(labels={"role": "experts"}, has_links=False)
    assert [each.name for each in topology.devices] == ["east-cpu", "west-cpu"]
    assert {each.reserved_bytes for each in topology.devices} == {reserve_bytes()}
    assert topology.links == ()
    with pytest.raises(ClusterError, match=r"no node carries the labels role=none\..*rack=east.*role=experts"):
        discover_topology(labels={"role": "none"})


@pytest.mark.ray
def test_a_reserve_that_leaves_nothing_is_an_error_that_names_the_nodes(cluster):
    with pytest.raises(ClusterError, match=r"none of the nodes head, east, west answered with more than 50 GB free"):
        discover_topology(50 * GB)
    with pytest.raises(ConfigError, match="timeout_s is 0"):
        discover_topology(timeout_s=0)


def num_probes():
    return sum(is_probe(each) for each in psutil.Process().children(recursive=True))


@pytest.mark.ray
def test_no_probe_stays_behind(cluster):
    nodes = alive_nodes({"role": "experts"})
    with discovery._probes(nodes) as probes:
        ports = [ray.get(probe.listen.remote("127.0.0.1", bytes(32), 60), timeout=60) for probe in probes.values()]
        assert num_probes() == 2
    deadline = time.monotonic() + 20
    while num_probes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while any(listens(port) for port in ports):  # a process that ends closes its sockets a moment later than its name
        assert time.monotonic() < deadline
        time.sleep(0.1)


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def is_probe(process):
    try:
        return "NodeProbe" in " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False


@pytest.mark.ray
def test_a_node_that_does_not_answer_is_left_out_by_name_and_a_dead_one_in_silence(cluster, caplog):
    east = cluster.workers[1]
    raylet = psutil.Process(east.all_processes["raylet"][0].process.pid)
    raylet.send_signal(signal.SIGSTOP)
    try:
        topology = discover_topology(0, timeout_s=8)
    finally:
        raylet.send_signal(signal.SIGCONT)
    assert [each.name for each in topology.devices] == ["head-cpu", "west-cpu"]
    assert len(topology.links) == 2
    assert "node east did not answer within 8 s; it is left out" in caplog.text
    caplog.clear()
    cluster.remove_node(east)
    topology = discover_topology(0, has_links=False)
    assert [each.name for each in topology.devices] == ["head-cpu", "west-cpu"]
    assert caplog.text == ""


def test_this_machine_has_one_id():
    assert boot_id() == boot_id() != ""
