"""From a connected Ray cluster to a topology: free memory of every node, and the links between them, measured.

One actor is pinned to each node for a few seconds. It asks Ray for no CPU and no GPU, so nothing can make it
wait for resources; a node on which it does not answer in time is left out, with a warning that names it.

- A node with GPUs offers these (``torch.cuda.mem_get_info``), one device each.
- A node without offers its RAM as one device: what is free, at most Ray's ``memory`` resource. Nodes that are
  processes on one machine share its free RAM equally.
- Links are measured between nodes (:mod:`cluster.link_probe`), one pair at a time so that they do not disturb
  each other; among more than ``MAX_NODES_FOR_ALL_PAIRS`` only from the home to each and back.

The node of the caller comes first: it is the home, where tokens and shared weights live.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.link import Link, LinkSpeed
from cluster.link_probe import LinkProbeServer, measure_link, new_token
from cluster.node_memory import NodeMemory, measure_memory
from cluster.reserve import reserve_bytes
from cluster.topology import Device, DeviceKind, Topology
from moe_bitnet.errors import ClusterError, ConfigError
from moe_bitnet.units import format_bytes

logger = logging.getLogger(__name__)

MAX_NODES_FOR_ALL_PAIRS = 8
LINK_TIMEOUT_S = 5.0
"""For one pair of nodes."""

_NODE_ID_LABEL = "ray.io/node-id"  # every node has it, with a value of its own


@dataclass(frozen=True)
class ClusterNode:
    """A node as Ray lists it.

    Attributes:
        node_id: Ray's hexadecimal id.
        name: for people and device names, unique in the cluster.
        host: its address in the cluster.
        num_gpus: GPUs that it announces.
        memory_bytes: Ray's ``memory`` resource, the ceiling of what Ray's work should take; 0 if it has none.
    """

    node_id: str
    name: str
    host: str
    num_gpus: int
    memory_bytes: int


def discover_topology(
    reserved_bytes: int | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    has_links: bool = True,
    timeout_s: float = 30.0,
) -> Topology:
    """Measure the devices of the Ray cluster that is connected, and the links between its nodes.

    Args:
        reserved_bytes: to keep free on every device; ``None`` takes ``reserve_bytes()``.
        labels: take only nodes that carry all of these labels.
        has_links: measure links; else the topology has none.
        timeout_s: seconds for the nodes to answer, and again for all links together.
    Returns:
        The devices, those of this node first, each with its node's id.
    Raises:
        ClusterError: Ray is not connected, no node has the labels, or none answers with memory to spare.
        ConfigError: ``reserved_bytes`` or ``timeout_s`` is out of range.
    """
    if not ray.is_initialized():  # else Ray would start a cluster of its own accord
        raise ClusterError("discover_topology: Ray is not connected. Call it inside 'with connect(...)'.")
    if not timeout_s > 0:
        raise ConfigError(f"discover_topology: timeout_s is {timeout_s!r}; give a positive number of seconds.")
    reserved_bytes = reserve_bytes() if reserved_bytes is None else reserved_bytes
    nodes = alive_nodes(labels)
    with _probes(nodes) as probes:
        memory_of_node = _measure_nodes(nodes, probes, timeout_s)
        devices = node_devices(
            [node for node in nodes if node.node_id in memory_of_node], memory_of_node, reserved_bytes
        )
        if not devices:
            raise ClusterError(
                f"none of the nodes {', '.join(node.name for node in nodes)} answered with more than "
                f"{format_bytes(reserved_bytes)} free. Free memory, reserve less, or give a topology file."
            )
        with_devices = {device.node_id for device in devices}
        in_use = [node for node in nodes if node.node_id in with_devices]
        links = _measure_links(in_use, probes, timeout_s) if has_links else []
    return Topology(tuple(devices), tuple(links))


def alive_nodes(labels: Mapping[str, str] | None = None) -> list[ClusterNode]:
    """List the nodes that Ray believes alive, this one first, the others by name.

    Args:
        labels: only nodes that carry all of these.
    Raises:
        ClusterError: no node carries them; the message lists the labels there are.
    """
    wanted = dict(labels or {})
    alive = [node for node in ray.nodes() if node["Alive"]]
    chosen = [node for node in alive if wanted.items() <= node["Labels"].items()]
    if not chosen:
        labels_found = {item for node in alive for item in node["Labels"].items() if item[0] != _NODE_ID_LABEL}
        found = [f"{key}={value}" for key, value in sorted(labels_found)]
        raise ClusterError(
            f"no node carries the labels {', '.join(f'{key}={value}' for key, value in wanted.items())}. "
            f"The {len(alive)} nodes of the cluster have {', '.join(found) or 'none'}."
        )
    names = Counter(node["NodeName"] for node in alive)
    home = ray.get_runtime_context().get_node_id()
    nodes = [
        ClusterNode(
            node_id=node["NodeID"],
            name=node["NodeName"] + (f"-{node['NodeID'][:8]}" if names[node["NodeName"]] > 1 else ""),
            host=node["NodeManagerAddress"],
            num_gpus=int(node["Resources"].get("GPU", 0)),
            memory_bytes=int(node["Resources"].get("memory", 0)),
        )
        for node in chosen
    ]
    return sorted(nodes, key=lambda node: (node.node_id != home, node.name))


def node_devices(
    nodes: Sequence[ClusterNode], memory_of_node: Mapping[str, NodeMemory], reserved_bytes: int
) -> list[Device]:
    """Turn what the nodes measured into devices; those with nothing to spare are left out with a warning.

    Args:
        nodes: in the order that the devices shall have.
        memory_of_node: by node id, one for each of them.
        reserved_bytes: to keep free on every device.
    """
    shares = Counter(memory_of_node[node.node_id].boot_id for node in nodes)
    devices = []
    for node in nodes:
        memory = memory_of_node[node.node_id]
        if node.num_gpus > len(memory.gpu_bytes):
            logger.warning(
                "node %s announces %d GPUs, torch sees %d there", node.name, node.num_gpus, len(memory.gpu_bytes)
            )
        free: list[tuple[DeviceKind, str, int]] = [
            ("cuda", f"{node.name}-cuda-{index}", size) for index, size in enumerate(memory.gpu_bytes)
        ]
        if not free:
            ram_bytes = memory.ram_bytes // shares[memory.boot_id]
            free = [("cpu", f"{node.name}-cpu", min(ram_bytes, node.memory_bytes or ram_bytes))]
        for index, (kind, name, free_bytes) in enumerate(free):
            if free_bytes <= reserved_bytes:
                logger.warning(
                    "device %s is left out: %s are free, %s are reserved",
                    name, format_bytes(free_bytes), format_bytes(reserved_bytes),
                )  # fmt: skip
                continue
            devices.append(Device(name, free_bytes, reserved_bytes, kind, node.node_id, index))
    return devices


@ray.remote(num_cpus=0, max_restarts=0)
class NodeProbe:
    """Measures on the node that it is pinned to."""

    def __init__(self) -> None:
        self._server: LinkProbeServer | None = None

    def memory(self, max_gpus: int) -> NodeMemory:
        """Measure free memory; see :func:`cluster.node_memory.measure_memory`."""
        return measure_memory(max_gpus)

    def listen(self, host: str, token: bytes, timeout_s: float) -> int:
        """Start a server for link probes at this node's address; returns its port."""
        self._server = LinkProbeServer(host, token, timeout_s)
        return self._server.port

    def link(self, host: str, port: int, token: bytes, source_host: str) -> LinkSpeed:
        """Measure the link to another node's server."""
        return measure_link(host, port, token, LINK_TIMEOUT_S, source_host)


@contextmanager
def _probes(nodes: Sequence[ClusterNode]) -> Iterator[dict[str, Any]]:
    """Start a probe on every node, by node id, without waiting; end them with the block."""
    actor_class: Any = NodeProbe  # Ray's decorator turns the class into something that type checkers do not see
    probes: dict[str, Any] = {}
    try:
        for node in nodes:
            pinned = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            probes[node.node_id] = actor_class.options(scheduling_strategy=pinned).remote()
        yield probes
    finally:
        for node_id, probe in probes.items():
            try:
                ray.kill(probe)
            except (ray.exceptions.RayError, ValueError, RuntimeError) as error:
                logger.warning("the probe on node %s could not be ended: %s", node_id, error)


def _measure_nodes(nodes: Sequence[ClusterNode], probes: Mapping[str, Any], timeout_s: float) -> dict[str, NodeMemory]:
    """Measure all nodes at once; those that do not answer in time are missing in the result."""
    answers = {node.node_id: probes[node.node_id].memory.remote(node.num_gpus) for node in nodes}
    return _gather(nodes, answers, timeout_s, "it is")


def _measure_links(nodes: Sequence[ClusterNode], probes: Mapping[str, Any], timeout_s: float) -> list[Link]:
    """Measure the links between nodes in turn, until the time is over."""
    if len(nodes) < 2:
        return []
    token, deadline = new_token(), time.monotonic() + timeout_s
    listening = {node.node_id: probes[node.node_id].listen.remote(node.host, token, timeout_s) for node in nodes}
    ports = _gather(nodes, listening, timeout_s, "its links are")
    pairs = [(a, b) for a, b in _pairs(nodes) if {a.node_id, b.node_id} <= ports.keys()]
    links: list[Link] = []
    for num_done, (source, destination) in enumerate(pairs):
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            logger.warning("%d of %d links were not measured within %g s", len(pairs) - num_done, len(pairs), timeout_s)
            break
        answer = probes[source.node_id].link.remote(destination.host, ports[destination.node_id], token, source.host)
        try:
            speed = ray.get(answer, timeout=min(remaining_s, 2 * LINK_TIMEOUT_S))
        except (ray.exceptions.RayError, ClusterError) as error:
            logger.warning("the link from %s to %s was not measured: %s", source.name, destination.name, _reason(error))
            continue
        links.append(Link(source.node_id, destination.node_id, speed.bandwidth_bytes_per_s, speed.latency_s))
    return links


def _pairs(nodes: Sequence[ClusterNode]) -> list[tuple[ClusterNode, ClusterNode]]:
    """List what to measure: all ordered pairs of few nodes, of many those with the first."""
    if len(nodes) <= MAX_NODES_FOR_ALL_PAIRS:
        return list(permutations(nodes, 2))
    home, *others = nodes
    logger.warning(
        "%d nodes: links are measured from %s to each other node and back, not between those (at most %d nodes for all "
        "pairs)", len(nodes), home.name, MAX_NODES_FOR_ALL_PAIRS,
    )  # fmt: skip
    return [pair for other in others for pair in ((home, other), (other, home))]


def _gather(nodes: Sequence[ClusterNode], answers: Mapping[str, Any], timeout_s: float, what: str) -> dict[str, Any]:
    """Wait for all answers at once; a node without one is named in a warning and left out."""
    ready, _ = ray.wait(list(answers.values()), num_returns=len(answers), timeout=timeout_s)
    found = {}
    for node in nodes:
        answer = answers[node.node_id]
        if answer not in ready:
            logger.warning("node %s did not answer within %g s; %s left out", node.name, timeout_s, what)
            continue
        try:
            found[node.node_id] = ray.get(answer)
        except (ray.exceptions.RayError, ClusterError) as error:
            logger.warning("node %s could not be probed (%s); %s left out", node.name, _reason(error), what)
    return found


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
