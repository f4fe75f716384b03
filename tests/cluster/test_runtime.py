import socket
import subprocess
import sys
import time

import pytest
import ray
from host_factories import model_of, place

from cluster.config import ClusterConfig
from cluster.runtime import connect, start_expert_hosts
from cluster.topology import Device, Topology
from moe_bitnet.errors import CheckpointError, ClusterError, ConfigError, PlacementError

KIND = "base3"


# --- Addresses


def assert_refused(address, match, timeout_s=20.0):
    start = time.monotonic()
    with (
        pytest.raises(ClusterError, match=match) as caught,
        connect(ClusterConfig(address=address, connect_timeout_s=timeout_s)),
    ):
        raise AssertionError("connected")
    assert "start one" in str(caught.value) or "such as" in str(caught.value), "it says what to do"
    assert not ray.is_initialized()
    return time.monotonic() - start


@pytest.mark.parametrize(
    "address",
    [
        "localhost",
        "127.0.0.1:",
        ":6379",
        "host:port",
        "127.0.0.1:6379x",
        "127.0.0.1:65536",
        "127.0.0.1:²",
        "ray://host",
    ],
)
def test_an_address_that_is_none_is_refused_at_once(address):
    assert assert_refused(address, "is not host:port") < 1


def test_a_host_that_cannot_be_a_name_is_refused():
    assert_refused("a" * 64 + ".invalid:6379", "no Ray cluster answers")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_where_nothing_listens_is_refused_at_once(scheme):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port, and nobody answers
        assert assert_refused(f"{scheme}127.0.0.1:{unused.getsockname()[1]}", "no Ray cluster answers") < 5


def test_a_socket_of_something_else_is_refused_in_time():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert assert_refused(address, "something listens at", timeout_s=2.0) < 4


# --- Connections


@pytest.fixture(scope="module")
def connected():
    with connect(ClusterConfig(num_cpus=1)):
        yield


@pytest.mark.ray
def test_a_connection_within_a_connection_leaves_it_open(connected):
    node_id = ray.get_runtime_context().get_node_id()
    with connect(), connect(ClusterConfig(address="127.0.0.1:1")):
        assert ray.get_runtime_context().get_node_id() == node_id
    assert ray.get_runtime_context().get_node_id() == node_id


@pytest.mark.ray
def test_a_running_cluster_is_joined_by_its_address_and_left_running(connected):
    address = ray.get_runtime_context().gcs_address
    program = """
import sys, ray
from cluster import ClusterConfig, connect
with connect(ClusterConfig(address=sys.argv[1])):
    print(ray.get_runtime_context().gcs_address)
assert not ray.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", program, address], check=True, capture_output=True, timeout=60)
    assert done.stdout.decode().strip().endswith(address)
    assert ray.get(ray.put(7)) == 7


# --- What is refused before any host is started


@pytest.fixture(scope="module")
def model():
    return model_of(KIND, num_shared_experts=1)


def start(model, problem, placement, checkpoint=None, **settings):
    with start_expert_hosts(model, problem, placement, ClusterConfig(**settings), checkpoint):
        raise AssertionError("started")


def test_a_placement_of_another_model_is_refused(model):
    for device_of_expert in ([[0] * 5] * 3, [[0] * 4] * 2):
        with pytest.raises(PlacementError, match="the model 2 of 5"):
            start(model, *place(device_of_expert, 1))


def test_a_placement_of_another_problem_is_refused(model):
    problem, _ = place([[0] * 5] * 2, 1)
    _, placement = place([[0, 1, 0, 1, 0]] * 2, 2)
    with pytest.raises(PlacementError, match="not in the topology"):
        start(model, problem, placement)


def test_int8_rows_for_float_experts_are_refused():
    with pytest.raises(ConfigError, match=r"dispatch is 'int8'.*Set dispatch to 'float32'"):
        start(model_of("float16"), *place([[0] * 5] * 2, 1))


def test_gpus_are_refused_by_name(model):
    problem, placement = place([[0, 1, 0, 1, 0]] * 2, 2)
    devices = [Device(each.name, each.memory_bytes, kind="cuda") for each in problem.topology.devices]
    on_gpus = type(problem)(2, 5, problem.expert_bytes, 0, Topology(tuple(devices)))
    with pytest.raises(ClusterError, match="device-0, device-1 are GPUs, and expert hosts compute on CPUs"):
        start(model, on_gpus, placement)


def test_a_checkpoint_that_is_none_is_refused(model, tmp_path):
    with pytest.raises(CheckpointError):
        start(model, *place([[0] * 5] * 2, 1), checkpoint=tmp_path)


def test_hosts_without_a_connection_are_refused(model, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterError, match="inside 'with connect"):
        start(model, *place([[0] * 5] * 2, 1))
