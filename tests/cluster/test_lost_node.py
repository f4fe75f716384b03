import copy
import socket

import pytest
import ray
import torch
from factories import random_token_ids
from host_factories import model_of
from ray.cluster_utils import Cluster

from cluster.config import ClusterConfig
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.runtime import connect, start_expert_hosts
from cluster.topology import Device, Topology
from moe_bitnet.checkpoint.sizes import model_sizes

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # three raylets

KIND = "2bit"
REPLICATED = [[[0], [1, 2], [2, 1], [1, 2], [0]], [[2, 1], [2, 1], [1, 2], [0], [1, 2]]]


@pytest.fixture
def cluster():
    """A head, where the home is, and two more nodes, all on this machine."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster, [cluster.add_node(num_cpus=1) for _ in range(2)]
    finally:
        ray.shutdown()
        cluster.shutdown()


def problem_on(model, node_ids):
    devices = tuple(Device(f"device-{index}", 10**9, node_id=node_id) for index, node_id in enumerate(node_ids))
    return PlacementProblem(2, 5, model_sizes(model.config, KIND).expert_bytes, 0, Topology(devices))


@torch.inference_mode()
def logits_of(model, token_ids):
    return model(token_ids).logits


def test_hosts_sit_on_their_devices_nodes_and_a_killed_raylet_is_survived(cluster):
    cluster, nodes = cluster
    model, token_ids = model_of(KIND), random_token_ids(1, 7)
    expected = logits_of(model, token_ids)
    with connect(ClusterConfig(address=cluster.address)):
        here = ray.get_runtime_context().get_node_id()
        problem = problem_on(model, [here, *(node.node_id for node in nodes)])
        placement = Placement.for_problem(problem, [f"device-{index}" for index in range(3)], REPLICATED)
        config = ClusterConfig(connect_timeout_s=60, combine="rows")
        with start_expert_hosts(model, problem, placement, config) as hosts:
            remote = copy.deepcopy(model)
            remote.replace_experts(hosts.executors)
            assert torch.equal(logits_of(remote, token_ids), expected)
            for name, node in zip(("device-1", "device-2"), nodes, strict=True):
                actor = hosts.hosts[name].actor
                assert (
                    ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))
                    == node.node_id
                )
                assert_listens_narrowly(hosts.invitation.directory.addresses, name)
            cluster.remove_node(nodes[1], allow_graceful=False)
            for _ in range(20):
                assert torch.equal(logits_of(remote, token_ids), expected)


def assert_listens_narrowly(addresses, name):
    """The port answers at the address that Ray knows the node by, and at no other of this machine."""
    endpoint = next(each.remote_endpoint for each in addresses if each.device_name == name)
    ip, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    assert ip == ray.util.get_node_ip_address()
    socket.create_connection((ip, int(port)), timeout=5).close()
    if ip != "127.0.0.1":
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)), timeout=5)
