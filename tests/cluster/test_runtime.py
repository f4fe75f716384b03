import contextlib
import copy
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import ray
import torch
from factories import ListCache, random_token_ids
from host_factories import model_of, place

from cluster.config import ClusterConfig
from cluster.placement.cost import expected_bytes_per_token
from cluster.runtime import connect, start_expert_hosts
from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.errors import ClusterError, ConfigError, PlacementError
from moe_bitnet.generation import generate

DEVICE_OF_EXPERT = [[0, 1, 2, 1, 0], [2, 2, 1, 2, 1]]  # the home holds nothing of layer 1
KIND = "base3"


def process_of(client):
    pid = ray.get(client._actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
    return psutil.Process(pid)


def expert_processes():
    """Processes of all expert hosts of the Ray that was started here."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "ExpertHostActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


def clients_of(hosts):
    return hosts.executors[0]._clients


def distributed(model, hosts):
    remote = copy.deepcopy(model)
    remote.replace_experts(hosts.executors)
    return remote


@torch.inference_mode()
def logits_of(model, token_ids):
    return model(token_ids).logits


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


# --- Expert hosts


@pytest.fixture(scope="module")
def model():
    return model_of(KIND, num_shared_experts=1)


def plan_for(model, device_of_expert, num_devices, **changes):
    sizes = model_sizes(model.config, KIND)
    return place(device_of_expert, num_devices, **{"expert_bytes": sizes.expert_bytes, **changes})


@pytest.fixture(scope="module")
def ready():
    """What ``on_host_ready`` was called with."""
    return []


@pytest.fixture(scope="module")
def hosts(connected, model, ready):
    problem, placement = plan_for(model, DEVICE_OF_EXPERT, 3)
    config = ClusterConfig(connect_timeout_s=120.0)
    with start_expert_hosts(model, problem, placement, config, lambda *arguments: ready.append(arguments)) as hosts:
        yield hosts


@pytest.mark.ray
@pytest.mark.parametrize("num_tokens", [1, 7, 33])
def test_logits_are_the_local_ones_bit_for_bit(hosts, model, num_tokens):
    token_ids = random_token_ids(1, num_tokens)
    assert torch.equal(logits_of(distributed(model, hosts), token_ids), logits_of(model, token_ids))


@pytest.mark.ray
def test_greedy_text_is_the_local_one(hosts, model):
    first, second = (
        generate(each, [5, 17, 2], max_new_tokens=9, cache=ListCache(2)) for each in (model, distributed(model, hosts))
    )
    assert second == first


@pytest.mark.ray
def test_hosts_hold_the_bytes_of_their_experts(hosts, model, ready):
    expert_bytes = model_sizes(model.config, KIND).expert_bytes
    assert hosts.held_bytes == [2 * expert_bytes, 4 * expert_bytes, 4 * expert_bytes]
    assert ready == [(f"device-{index}", held_bytes) for index, held_bytes in enumerate(hosts.held_bytes)]


@pytest.mark.ray
def test_the_meter_sees_the_traffic(hosts, model):
    hosts.meter.reset()
    logits_of(distributed(model, hosts), random_token_ids(8, 33))
    _, placement = plan_for(model, DEVICE_OF_EXPERT, 3)
    uniform = expected_bytes_per_token(placement, 2, 12, "int8", "float32").total_bytes
    assert hosts.meter.num_tokens == 8 * 33
    # the router of a random model is near uniform; exact bytes are compared where no Ray is needed
    assert hosts.meter.bytes_per_token(["payload", "metadata"]) == pytest.approx(uniform, rel=0.3)


@pytest.mark.ray
def test_a_host_that_is_too_slow_is_an_error(hosts, model, monkeypatch):
    client = clients_of(hosts)[2]
    is_done = client._actor.__ray_call__.remote(lambda _: time.sleep(1.5))
    monkeypatch.setattr(client, "timeout_s", 0.1)
    with pytest.raises(ClusterError, match="'device-2' did not answer within"):
        logits_of(distributed(model, hosts), random_token_ids(1, 33))
    ray.get(is_done, timeout=60)


@pytest.mark.ray
def test_a_killed_host_is_an_error_and_none_outlives_the_block(connected, model, caplog):
    problem, placement = plan_for(model, [[0, 1, 1, 1, 0], [1, 0, 1, 0, 1]], 2)
    token_ids, expected = random_token_ids(1, 33), logits_of(model, random_token_ids(1, 33))
    caplog.set_level(logging.INFO)
    with start_expert_hosts(model, problem, placement, ClusterConfig(connect_timeout_s=120.0)) as hosts:
        remote = distributed(model, hosts)
        processes = [process_of(client) for client in clients_of(hosts)]
        assert torch.equal(logits_of(remote, token_ids), expected)
        # stopped, so that the frame surely waits for it when it is killed
        processes[1].send_signal(signal.SIGSTOP)
        receive = clients_of(hosts)[1].send(b"")
        processes[1].kill()
        with pytest.raises(ClusterError, match="'device-1' died"):
            receive()
        for _ in range(2):
            with pytest.raises(ClusterError, match="'device-1' died"):
                logits_of(remote, token_ids)
    assert "host device-1 is ready" in caplog.text
    assert not psutil.wait_procs(processes, timeout=20)[1]
    with pytest.raises(ClusterError, match="'device-0' died"):
        clients_of(hosts)[0].send(b"")()


@pytest.mark.ray
def test_a_start_that_fails_says_why_and_leaves_no_host(hosts, model):
    """The problem understates the experts, so that only the host itself sees that they do not fit."""
    problem, placement = plan_for(model, [[0] * 5] * 2, 1, expert_bytes=1, memory_bytes=1000)
    before = expert_processes()
    assert len(before) == 3
    with (
        pytest.raises(PlacementError, match=r"'device-0' holds .* bytes are missing"),
        start_expert_hosts(model, problem, placement, ClusterConfig(connect_timeout_s=120.0)),
    ):
        raise AssertionError("started")
    new = [process for process in expert_processes() if process not in before]
    assert not psutil.wait_procs(new, timeout=20)[1]


# --- What is refused before anything is started


def start(model, problem, placement, **settings):
    with start_expert_hosts(model, problem, placement, ClusterConfig(**settings)):
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


def test_hosts_without_a_connection_are_refused(model, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterError, match="inside 'with connect"):
        start(model, *place([[0] * 5] * 2, 1))


@pytest.mark.ray
def test_a_model_without_its_experts_is_refused(hosts, model):
    with pytest.raises(ClusterError, match="elsewhere already"):
        start(distributed(model, hosts), *place([[0] * 5] * 2, 1))
